// What htmx does not do: errors next to their cause, the dialog, streamed answers, the height of a report.
"use strict";

(() => {
  const problemOf = (element) => (element?.closest("dialog, .panel, main") || document).querySelector("[data-problem]") || document.querySelector("[data-problem]");

  function complain(element, words) {
    const line = Object.assign(document.createElement("p"), { className: "problem", textContent: words });
    line.setAttribute("role", "alert");
    problemOf(element)?.replaceChildren(line);
  }

  // --- errors: shown in the nearest [data-problem] ---

  document.addEventListener("htmx:beforeSwap", (event) => {
    const { xhr, elt } = event.detail;
    if (xhr.status >= 400) {
      event.detail.shouldSwap = true;
      event.detail.isError = false; // the page shows it
      event.detail.target = problemOf(elt);
      event.detail.swapOverride = "innerHTML";
      elt.querySelector?.(".waiting-now")?.remove();
    } else {
      problemOf(elt)?.replaceChildren();
    }
  });
  document.addEventListener("htmx:sendError", (event) => complain(event.detail.elt, "The server does not answer. Is it still running?"));

  // --- the dialog ---

  const dialog = () => document.getElementById("dialog");
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id === "dialog-body" && !dialog().open) dialog().showModal();
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-close]") && dialog().open) {
      event.preventDefault();
      dialog().close();
    } else if (event.target === dialog()) {
      dialog().close(); // a click outside
    }
  });

  // --- a form that takes a while says so, and is sent once ---

  document.addEventListener("submit", (event) => {
    if (event.target.matches("[data-busy]")) event.target.classList.add("htmx-request");
  });
  addEventListener("pageshow", () => document.querySelectorAll("[data-busy]").forEach((form) => form.classList.remove("htmx-request")));

  // --- the playground ---

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#ask")) event.target.form.requestSubmit();
  });
  document.addEventListener("htmx:load", (event) => {
    const panels = event.detail.elt.matches?.("[data-stream]") ? [event.detail.elt] : event.detail.elt.querySelectorAll?.("[data-stream]") || [];
    for (const panel of panels) ask(panel);
  });

  async function ask(panel) {
    const written = panel.querySelector(".written"), foot = panel.querySelector("[data-foot]");
    const began = performance.now();
    try {
      const headers = { ...JSON.parse(document.body.getAttribute("hx-headers")), "hx-request": "true" };
      const answer = await fetch(panel.dataset.stream, { method: "POST", headers, body: new URLSearchParams(JSON.parse(panel.dataset.fields)) });
      if (!answer.ok) {
        if (answer.headers.get("hx-redirect")) location.href = answer.headers.get("hx-redirect");
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        throw new Error(page.querySelector(".problem")?.textContent || "The request failed.");
      }
      const result = await read(answer, written, panel);
      foot.replaceChildren(...facts(answer.headers, result, began));
    } catch (error) {
      foot.replaceChildren();
      complain(panel, error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    }
  }

  async function read(answer, written, panel) {
    const result = { first: null, usage: null, reason: null };
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
          result.first ??= performance.now();
          result.reason = choice.finish_reason ?? result.reason;
          written.append(choice.text);
        }
      }
    }
    result.ended = performance.now();
    return result;
  }

  const ms = (value) => (value >= 1000 ? `${(value / 1000).toFixed(1)} s` : value < 100 ? `${value.toFixed(1)} ms` : `${value.toFixed(0)} ms`);

  function facts(headers, result, began) {
    const loading = headers.get("turret-load-seconds"), load = loading === null ? 0 : 1000 * Number(loading);
    const version = headers.get("turret-adapter") ? `${headers.get("turret-adapter")}@${headers.get("turret-version")}` : "the bare base";
    return [
      list("facts strip foot-facts", [
        ["First word", ms(Math.max(0, result.first - began - load))],
        ["Last word", ms(Math.max(0, result.ended - began - load))],
        ["Load", loading === null ? "in memory already" : `${ms(load)} to load`],
        ...(result.usage ? [["Tokens", `${result.usage.prompt_tokens} read, ${result.usage.completion_tokens} generated`]] : []),
        ["Ended", result.reason === "length" ? "token limit" : "stop"],
      ]),
      list("receipt", [["Receipt", headers.get("turret-receipt")], ["Version", version], ["Base", (headers.get("turret-base") || "").replace("sha256:", "").slice(0, 12)]]),
    ];
  }

  function list(name, rows) {
    const made = Object.assign(document.createElement("dl"), { className: name });
    for (const [word, value] of rows) {
      const row = document.createElement("div");
      row.append(Object.assign(document.createElement("dt"), { textContent: word }), Object.assign(document.createElement("dd"), { textContent: value }));
      made.append(row);
    }
    return made;
  }

  // --- a report's frame is as tall as the report ---

  document.addEventListener("DOMContentLoaded", () => {
    for (const frame of document.querySelectorAll("iframe[data-grow]")) {
      const fit = () => (frame.style.height = `${frame.contentDocument.documentElement.offsetHeight + 4}px`);
      const begin = () => {
        fit();
        new ResizeObserver(fit).observe(frame.contentDocument.body);
      };
      if (frame.contentDocument?.readyState === "complete" && frame.contentDocument.body?.childElementCount) begin();
      frame.addEventListener("load", begin);
    }
  });
})();
