// The plots of a run and of an experiment, drawn by uPlot from a JSON route, and again while it runs.
"use strict";

(() => {
  const drawn = new Map(); // element -> {chart, series}
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faint = (name, percent) => `color-mix(in srgb, ${colour(name)} ${percent}%, transparent)`;
  const short = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
    return size >= 1000 ? value.toLocaleString("en") : String(+value.toPrecision(3));
  };

  // The legend has the value under the cursor, or the newest one.
  const latest = (chart, value, place, say) => {
    const found = value ?? (chart.cursor?.idx == null ? chart.data[place].findLast((each) => each != null) : null);
    return found == null ? "none" : say(found);
  };
  // A faint line has a faint marker, so that no two lines of a legend look alike.
  const marker = (plot, place) => {
    const line = plot.lines[place - 1];
    return line == null ? "transparent" : line.alpha == null ? colour(line.colour) : faint(line.colour, 100 * line.alpha);
  };

  function options(element, plot) {
    const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const x = { ...axis, size: 30, grid: { show: false }, values: (_, ticks) => ticks.map((each) => (Number.isInteger(each) ? (plot.sayX || short)(each) : "")) };
    const tens = (_, ticks) => ticks.map((each) => (Number.isInteger(Math.log10(each)) ? each : null));
    const y = { ...axis, grid: plot.log ? { ...axis.grid, filter: tens } : axis.grid, size: 54, values: (_, ticks) => ticks.map((each) => (each == null ? "" : (plot.say || short)(each))) };
    return {
      width: Math.max(220, element.clientWidth),
      height: 220,
      padding: [8, 24, 0, 0],
      cursor: { drag: { x: true, y: false }, points: { size: 6 } },
      legend: { live: true, markers: { fill: (_, place) => marker(plot, place), stroke: (_, place) => marker(plot, place) } },
      scales: { x: { time: false }, y: { distr: plot.log ? 3 : 1, range: plot.range } },
      axes: [x, y],
      bands: plot.bands || [],
      series: [
        { label: plot.x, value: (chart, value, place) => latest(chart, value, place, plot.sayX || ((each) => each.toLocaleString("en"))) },
        ...plot.lines.map((line) => ({
          label: line.label,
          stroke: colour(line.colour),
          width: line.width ?? 2,
          dash: line.dash,
          fill: line.fill,
          alpha: line.alpha ?? 1,
          spanGaps: true,
          points: { show: line.dots ?? false, size: 7, fill: colour(line.colour) },
          value: (chart, value, place) => latest(chart, value, place, plot.say || short),
        })),
      ],
    };
  }

  function draw(element, plot) {
    const shape = JSON.stringify([plot.lines.map((line) => line.label), plot.log]);
    const known = drawn.get(element);
    if (!plot.data[0].length) {
      if (!known) element.replaceChildren(Object.assign(document.createElement("p"), { className: "none", textContent: plot.none }));
      return;
    }
    if (known && known.shape === shape) {
      known.chart.setData(plot.data);
    } else {
      known?.chart.destroy();
      element.replaceChildren();
      drawn.set(element, { chart: new uPlot(options(element, plot), plot.data, element), shape, plot });
    }
    drawn.get(element).plot = plot;
  }

  function again() {
    for (const [element, known] of drawn) {
      known.chart.destroy();
      element.replaceChildren();
      known.chart = new uPlot(options(element, known.plot), known.plot.data, element);
    }
  }

  // --- a run ---

  function smooth(values) {
    let mean = null;
    const keep = 1 - 1 / Math.max(2, Math.min(40, values.length / 15));
    return values.map((value) => (mean = mean == null ? value : keep * mean + (1 - keep) * value));
  }

  function ofRun(run) {
    const goes = document.querySelector("[data-running]") !== null;
    const none = goes ? "no step yet" : "no step was made";
    const steps = run.steps, x = steps.map((each) => each.step);
    const chief = run.metric?.key;
    const held = steps.find((each) => each.split)?.split || "held out";
    const loss = steps.map((each) => each.loss);
    const measured = chief ? steps.filter((each) => each.metrics?.[chief] != null) : [];
    const lossHeld = steps.map((each) => each.metrics?.loss ?? null);
    return {
      loss: {
        x: "step", none, data: [x, loss, smooth(loss), lossHeld],
        lines: [
          { label: "loss of each step", colour: "accent", width: 1, alpha: 0.35 },
          { label: "loss, smoothed", colour: "accent" },
          { label: `loss, ${held}`, colour: "second", dots: true },
        ],
      },
      metric: {
        x: "step", none: goes ? "no evaluation yet" : "no evaluation was made during the training", say: (value) => (value == null ? "–" : `${(100 * value).toFixed(1)}%`),
        data: [measured.map((each) => each.step), measured.map((each) => each.metrics[chief])],
        lines: [{ label: `${run.metric?.name}, ${held}`, colour: "second", dots: true }],
      },
      lr: { x: "step", none, data: [x, steps.map((each) => each.lr)], lines: [{ label: "learning rate", colour: "third" }] },
      memory: {
        x: "step", none, say: (value) => (value == null ? "–" : `${Math.round(value)} MB`),
        data: [x, steps.map((each) => each.rss / 1e6)], lines: [{ label: "memory", colour: "good", fill: faint("good", 12) }],
      },
    };
  }

  // --- several runs ---

  function ofRuns({ curves }) {
    const lines = curves.map((curve, place) => ({ label: `${curve.name} ${curve.run.slice(-6)}`, colour: HUES[place % HUES.length], dash: place < HUES.length ? undefined : [6, 3] }));
    const over = (read) => {
      const own = curves.map((curve) => new Map(read(curve)));
      const x = [...new Set(own.flatMap((each) => [...each.keys()]))].sort((a, b) => a - b);
      return [x, ...own.map((each) => x.map((step) => each.get(step) ?? null))];
    };
    const losses = (curve) => {
      const smoothed = smooth(curve.points.map((each) => each.loss));
      return curve.points.map((each, place) => [each.step, smoothed[place]]);
    };
    const held = (curve) => curve.points.filter((each) => each.held_out != null).map((each) => [each.step, each.held_out]);
    return {
      loss: { x: "step", none: "no step here", data: over(losses), lines },
      metric: { x: "step", none: "no evaluation here", say: (value) => (value == null ? "–" : `${(100 * value).toFixed(1)}%`), data: over(held), lines: lines.map((line) => ({ ...line, dots: true })) },
    };
  }

  // --- an experiment ---

  const HUES = ["accent", "second", "third", "open", "good", "bad", "soft"];

  function ofExperiment(experiment) {
    const points = experiment.points, x = points.map((each) => each.outcomes);
    const arms = points.length ? Object.keys(points[0].against) : [];
    const of = (arm, read) => points.map((each) => read(each.against[arm]) ?? null);
    const many = arms.length > 1;
    const evidence = [], values = [x], difference = [], spread = [x], bands = [];
    arms.forEach((arm, place) => {
      const hue = HUES[place % HUES.length];
      evidence.push({ label: many ? `${arm} better` : "better", colour: many ? hue : "good" }, { label: many ? `${arm} worse` : "worse", colour: many ? hue : "bad", dash: many ? [3, 3] : undefined });
      values.push(of(arm, (one) => Math.max(one.evidence.better, 0.01)), of(arm, (one) => Math.max(one.evidence.worse, 0.01)));
      const first = spread.length;
      difference.push({ label: many ? arm : "difference", colour: hue }, { label: "from", colour: hue, width: 1, alpha: 0.5 }, { label: "to", colour: hue, width: 1, alpha: 0.5 });
      spread.push(of(arm, (one) => one.difference), of(arm, (one) => one.interval?.[0]), of(arm, (one) => one.interval?.[1]));
      bands.push({ series: [first + 2, first + 1], fill: faint(hue, 14) });
    });
    if (arms.length) {
      evidence.push({ label: "threshold", colour: "soft", width: 1, dash: [6, 4] });
      values.push(of(arms[0], (one) => one.evidence.needed));
      difference.push({ label: "no difference", colour: "soft", width: 1, dash: [6, 4] });
      spread.push(x.map(() => 0));
    }
    return {
      evidence: { x: "outcomes", none: "no outcome yet", log: true, data: values, lines: evidence },
      difference: { x: "outcomes", none: "no outcome of each arm yet", data: spread, lines: difference, bands, say: (value) => (value == null ? "–" : `${value > 0 ? "+" : ""}${+value.toPrecision(3)}`) },
    };
  }

  // --- usage ---

  function ofUsage(usage) {
    const names = Object.keys(usage.lines);
    return {
      days: {
        x: "day", none: "nothing was asked in these days", sayX: (place) => (usage.days[place] || "").slice(5),
        say: (value) => (value == null ? "–" : value.toLocaleString("en")),
        data: [usage.days.map((_, place) => place), ...names.map((name) => usage.lines[name])],
        lines: names.map((name, place) => ({ label: name, colour: HUES[place % HUES.length], dots: true })),
      },
    };
  }

  // --- all of them ---

  const READ = { run: ofRun, runs: ofRuns, experiment: ofExperiment, usage: ofUsage };

  async function load(place) {
    place.hidden = document.querySelector("[data-waiting]") !== null; // a run that waits has nothing to draw
    if (place.hidden) return;
    const answer = await fetch(place.dataset.url, { headers: { accept: "application/json" }, redirect: "error" });
    if (!answer.ok) throw new Error(String(answer.status));
    const plots = READ[place.dataset.plots](await answer.json());
    for (const element of place.querySelectorAll("[data-plot]")) draw(element, plots[element.dataset.plot]);
  }

  async function follow(place) {
    let runs = true;
    while (runs && place.isConnected) {
      runs = document.querySelector("[data-running]") !== null; // read before loading, so that the end of a run is loaded too
      if (!document.hidden) await load(place).catch(() => {});
      await new Promise((done) => setTimeout(done, place.dataset.plots.startsWith("run") ? 1500 : 5000));
    }
  }

  document.addEventListener("DOMContentLoaded", () => {
    for (const place of document.querySelectorAll("[data-plots]")) follow(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    let width = innerWidth;
    addEventListener("resize", () => {
      if (width === innerWidth) return;
      width = innerWidth;
      for (const [element, known] of drawn) known.chart.setSize({ width: Math.max(220, element.clientWidth), height: 220 });
    });
  });
})();
