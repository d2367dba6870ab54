// What htmx does not do: errors next to their cause, the dialog, the height of a report.
"use strict";

(() => {
  const problemOf = (element) => (element?.closest("dialog, .panel, main") || document).querySelector("[data-problem]") || document.querySelector("[data-problem]");

  function complain(element, words) {
    const line = Object.assign(document.createElement("p"), { className: "problem", textContent: words });
    line.setAttribute("role", "alert");
    problemOf(element)?.replaceChildren(line);
  }
  globalThis.turret = { complain };

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
