// The playground: streamed answers, the next turn of a chat, copies, links, and the history of this browser.
"use strict";

(() => {
  const form = document.getElementById("ask"), answers = document.getElementById("answers");
  if (!form) return;
  const GONE = "The server does not answer. Is it still running?";
  const HISTORY = "turret-playground", MOST_ASKED = 20, MOST_LINK = 16000; // entries; characters
  const mode = form.elements.as.value, chat = mode === "chat";
  let going = 0; // answers that are being streamed
  const made = (tag, values, ...inside) => {
    const element = Object.assign(document.createElement(tag), values);
    element.append(...inside);
    return element;
  };
  const headers = () => ({ ...JSON.parse(document.body.getAttribute("hx-headers")), "hx-request": "true" });
  const post = (path, fields, signal) => fetch(path, { method: "POST", headers: headers(), body: new URLSearchParams(fields), signal });
  const tell = (words) => (form.querySelector("[data-told]").textContent = words);

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form === form) form.requestSubmit();
  });
  document.addEventListener("htmx:load", (event) => prepare(event.detail.elt));

  function prepare(element) {
    element.querySelectorAll("[data-copy]").forEach((each) => (each.hidden = false));
    element.querySelectorAll("[data-stream]").forEach((each) => {
      const { stream, fields } = each.dataset;
      delete each.dataset.stream; // asked once
      if (stream) ask(each.closest(".panel"), stream, JSON.parse(fields));
    });
  }

  // --- a streamed answer ---

  async function ask(panel, path, fields) {
    const written = panel.querySelector("output"), foot = panel.querySelector("[data-foot]");
    const began = performance.now(), stopping = new AbortController();
    const result = { first: null, ended: null, usage: null, reason: null, text: "", calls: [], shared: false };
    const stop = made("button", { type: "button", className: "quiet small", textContent: "Stop" });
    stop.addEventListener("click", () => stopping.abort());
    foot.append(stop);
    going += 1;
    try {
      const answer = await post(path, fields, stopping.signal);
      if (!answer.ok) {
        if (answer.headers.get("hx-redirect")) location.href = answer.headers.get("hx-redirect");
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        throw new Error(page.querySelector(".problem")?.textContent || "The request failed.");
      }
      await read(answer, written, result);
      if (fields.thread) goOn(panel, JSON.parse(fields.thread), result);
      foot.replaceChildren(...facts(answer.headers, result, began));
    } catch (error) {
      foot.replaceChildren();
      if (error.name !== "AbortError") turret.complain(panel, error instanceof TypeError ? GONE : error.message);
      else if (fields.thread && result.text) goOn(panel, JSON.parse(fields.thread), result);
    } finally {
      going -= 1;
    }
  }

  async function read(answer, written, result) {
    const decoder = new TextDecoder(), reader = answer.body.getReader();
    for (let rest = "", piece = await reader.read(); !piece.done; piece = await reader.read()) {
      const lines = (rest + decoder.decode(piece.value, { stream: true })).split("\n\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = line.slice("data: ".length);
        if (data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        result.usage = chunk.usage ?? result.usage;
        for (const choice of chunk.choices ?? []) {
          const text = choice.text ?? choice.delta?.content ?? "", tokens = tokensOf(choice.logprobs);
          result.first ??= performance.now();
          result.reason = choice.finish_reason ?? result.reason;
          result.text += text;
          result.calls.push(...(choice.delta?.tool_calls ?? []).map(({ index, ...call }) => call));
          result.shared ||= tokens.length > 0; // the tokens are the text, also where it is held back for a call
          written.append(...(result.shared ? tokens : [text]));
        }
      }
    }
    result.ended = performance.now();
  }

  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(0)}%`;

  function tokensOf(given) {
    const listed = given?.content?.map((each) => [each.token, each.logprob, each.top_logprobs.map((other) => [other.token, other.logprob])])
      ?? given?.tokens?.map((token, place) => [token, given.token_logprobs[place], Object.entries(given.top_logprobs[place])]) ?? [];
    return listed.map(([token, own, likely]) => made("span", {
      className: `token p${Math.min(4, Math.floor(5 * Math.exp(own)))}`,
      title: likely.map(([text, value]) => `${JSON.stringify(text).slice(1, -1)} ${percent(value)}`).join(", "),
    }, token, made("span", { className: "hidden", textContent: ` (${percent(own)})` })));
  }

  // --- the next turn ---

  function goOn(panel, thread, { text, calls }) {
    thread.messages.push({ role: "assistant", ...(calls.length ? { content: text.trim() || null, tool_calls: calls } : { content: text }) });
    panel.querySelector("[name=thread]").value = JSON.stringify(thread);
    const place = panel.querySelector("[data-calls]");
    for (const { id, function: called } of calls) {
      const result = made("textarea", { name: `result:${id}`, rows: 2 });
      result.setAttribute("form", "ask");
      place.append(made("p", {}, made("code", { textContent: `${called.name}(${called.arguments})` })), made("label", {}, "Result of ", made("code", { textContent: called.name }), " ", result));
    }
    if (!calls.length) return;
    const send = made("button", { className: "quiet small", textContent: "Send the result" });
    send.setAttribute("form", "ask");
    place.append(send);
  }

  form.addEventListener("htmx:afterRequest", (event) => {
    if (!event.detail.successful || event.detail.elt !== form || event.detail.requestConfig.formData?.get("code")) return;
    keep(asked);
    if (chat) form.elements.text.value = "";
  });

  // --- the facts below an answer ---

  const ms = (value) => (value >= 1000 ? `${(value / 1000).toFixed(1)} s` : value < 100 ? `${value.toFixed(1)} ms` : `${value.toFixed(0)} ms`);

  function facts(headers, result, began) {
    const loading = headers.get("turret-load-seconds"), load = loading === null ? 0 : 1000 * Number(loading);
    const version = headers.get("turret-adapter") ? `${headers.get("turret-adapter")}@${headers.get("turret-version")}` : "the bare base";
    const reasons = { length: "token limit", tool_calls: "to call a tool" };
    return [
      list("facts strip foot-facts", [
        ["First word", ms(Math.max(0, result.first - began - load))],
        ["Last word", ms(Math.max(0, result.ended - began - load))],
        ["Load", loading === null ? "in memory already" : `${ms(load)} to load`],
        ...(result.usage ? [["Tokens", `${result.usage.prompt_tokens} read, ${result.usage.completion_tokens} generated`]] : []),
        ["Ended", reasons[result.reason] ?? "stop"],
      ]),
      list("receipt", [["Receipt", headers.get("turret-receipt")], ["Version", version], ["Base", (headers.get("turret-base") || "").replace("sha256:", "").slice(0, 12)]]),
    ];
  }

  const list = (className, rows) =>
    made("dl", { className }, ...rows.map(([word, value]) => made("div", {}, made("dt", { textContent: word }), made("dd", { textContent: value }))));

  // --- copies and links: a link has what is on the page behind #, so no server and no proxy sees it ---

  document.addEventListener("click", async (event) => {
    const copy = event.target.closest("[data-copy]"), link = event.target.closest("[data-link]");
    if (!copy && !link) return;
    const text = copy ? copy.closest(".head").nextElementSibling.textContent : location.origin + here();
    if (link && text.length > MOST_LINK) return tell(`This is too long for a link of ${MOST_LINK} characters.`);
    try {
      await navigator.clipboard.writeText(text);
      (copy ?? link).textContent = "Copied";
    } catch {
      if (link) location.hash = text.slice(text.indexOf("#"));
      tell(link ? "The address of this page is the link." : "This browser does not copy here: select the code.");
    }
  });

  function here() {
    const said = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (!["form_token", "as", "table"].includes(name)) said.append(name, value);
    return `/playground?as=${mode}#${said}`;
  }

  async function open() {
    const said = new URLSearchParams(location.hash.slice(1));
    if (!said.has("model")) return;
    for (const each of form.elements) {
      if (!each.name || each.type === "hidden") continue;
      if (each.type === "checkbox") each.checked = said.getAll(each.name).includes(each.value);
      else if (said.has(each.name)) each.value = said.get(each.name);
    }
    form.querySelectorAll("details").forEach((each) => (each.open ||= [...each.querySelectorAll("textarea")].some((area) => area.value)));
    const fields = [["as", "chat"]];
    for (const thread of said.getAll("thread")) {
      try {
        const { model, messages } = JSON.parse(thread);
        if (messages.length) fields.push(["thread", thread], ["model", model]);
      } catch {} // the link is cut
    }
    if (fields.length === 1) return;
    const shown = await post("/playground", fields); // without a new turn: nothing is asked
    if (!shown.ok) return;
    answers.innerHTML = await shown.text();
    htmx.process(answers);
    prepare(answers);
  }

  // --- what was asked before, in this browser alone ---

  const history = form.querySelector("[data-history]");
  const kept = () => {
    try {
      const found = JSON.parse(localStorage.getItem(HISTORY) ?? "[]");
      return Array.isArray(found) ? found.filter((each) => String(each.url).startsWith("/playground?")) : [];
    } catch {
      return [];
    }
  };
  let asked = null;
  form.addEventListener("htmx:beforeRequest", (event) => {
    tell(chat && going ? "Wait for the answers: the conversation goes on after them." : "");
    if (chat && going) return event.preventDefault();
    asked = { url: here(), words: (form.elements.text?.value || "a turn without words").slice(0, 60), at: new Date().toLocaleString() };
  });

  function keep(entry) {
    if (entry.url.length > MOST_LINK || mode === "file") return; // a table is too large
    try {
      localStorage.setItem(HISTORY, JSON.stringify([entry, ...kept().filter((each) => each.url !== entry.url)].slice(0, MOST_ASKED)));
    } catch {} // the browser keeps nothing
    show();
  }

  function show() {
    const found = kept();
    history.hidden = !found.length;
    history.querySelector("ol").replaceChildren(...found.map((each) => made("li", {}, made("a", { href: each.url, textContent: each.words }), " ", made("span", { className: "soft", textContent: each.at }))));
  }

  history.querySelector("button").addEventListener("click", () => {
    localStorage.removeItem(HISTORY);
    show();
  });
  form.querySelector("[data-link]").hidden = mode === "file";
  show();
  addEventListener("hashchange", open);
  open();
})();
