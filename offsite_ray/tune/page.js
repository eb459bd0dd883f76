// SPDX-License-Identifier: Apache-2.0
// Draws the plots of a sweep from the numbers in its page. Asks the network for nothing.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = document.getElementById("blank").namespaceURI;
  const points = data.points;
  const byId = new Map(points.map((point) => [point.id, point]));
  const better = data.lower ? "lower is better" : "higher is better";
  const quality = `${data.unit} (${better})`;
  const DASH = "\u2013";

  // Okabe and Ito's colours, which colour-blind readers tell apart, each with a shape of its own.
  const INKS = ["var(--blue)", "var(--vermillion)", "var(--green)", "var(--purple)", "var(--orange)"];
  const SHAPES = [
    (r) => `M${-r} 0A${r} ${r} 0 1 0 ${r} 0A${r} ${r} 0 1 0 ${-r} 0Z`,
    (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
    (r) => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}Z`,
    (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0Z`,
    (r) => `M0 ${1.2 * r}L${1.2 * r} ${-r}H${-1.2 * r}Z`,
  ];
  const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 2"];

  const mean = (pair) => (pair === undefined ? null : pair[0]);
  const shown = (value, digits = 3) =>
    value === null || value === undefined ? DASH : value.toFixed(digits).replace("-", "\u2212");
  const pair = ([value, spread]) =>
    spread === null ? shown(value) : `${shown(value)} \u00b1 ${shown(spread)}`;
  const size = (bytes) => {
    if (bytes === null) return DASH;
    const power = Math.min(4, Math.floor(Math.log2(Math.max(bytes, 1)) / 10));
    return `${(bytes / 1024 ** power).toFixed(power ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
  };
  const words = (point) =>
    [
      point.plan,
      point.select,
      point.compress === "none" ? "" : point.compress,
      point.steps ? `${point.steps} steps` : "not distilled",
      point.method === "full" ? "" : point.method,
      point.learning_rate === null ? "" : `lr ${point.learning_rate}`,
    ].filter(Boolean).join(", ");

  function add(parent, name, attributes = {}, text = null) {
    const node = parent.namespaceURI === SVG || name === "svg"
      ? document.createElementNS(SVG, name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    parent.append(node);
    return node;
  }

  function ticks(low, high, most) {
    const raw = (high - low) / Math.max(1, most) || 1;
    const base = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * base).find((s) => s >= raw);
    const found = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) found.push(v);
    return found.map((v) => Number(v.toPrecision(12)));
  }

  // A frame with axes: `x` and `y` map values to pixels. `fixed` are ticks of a numbered axis.
  function frame(box, { xs, ys, xLabel, yLabel, height = 270, fixed = null, zero = false }) {
    box.replaceChildren();
    const width = Math.max(260, box.clientWidth);
    const [left, right, top, bottom] = [54, 12, 10, 42];
    const svg = add(box, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
    svg.setAttribute("aria-label", `${yLabel} over ${xLabel}`);
    const span = (values) => {
      const known = values.filter((v) => v !== null && Number.isFinite(v));
      if (zero && values === ys) known.push(0);
      const [low, high] = [Math.min(...known), Math.max(...known)];
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      return [low - room, high + room];
    };
    const [[x0, x1], [y0, y1]] = [span(xs), span(ys)];
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
    const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
    for (const v of ticks(y0, y1, 5)) {
      const rule = v === 0 && zero ? "rule strong" : "rule";
      add(svg, "path", { d: `M${left} ${y(v)}H${width - right}`, class: rule });
      add(svg, "text", { x: left - 6, y: y(v) + 4, class: "tick end" }, String(v).replace("-", "\u2212"));
    }
    const along = (fixed || ticks(x0, x1, width < 420 ? 4 : 7)).filter((v) => v >= x0 && v <= x1);
    for (const v of along) {
      add(svg, "text", { x: x(v), y: height - bottom + 16, class: "tick middle" },
        String(v).replace("-", "\u2212"));
    }
    add(svg, "text", { x: (left + width - right) / 2, y: height - 6, class: "axis middle" }, xLabel);
    add(svg, "text", {
      transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, class: "axis middle",
    }, yLabel);
    return { svg, x, y, left, right: width - right };
  }

  function mark(axes, point, x, y, series, { r = 5, hollow = false, title } = {}) {
    const attributes = {
      d: SHAPES[series % 5](r),
      transform: `translate(${axes.x(x)} ${axes.y(y)})`,
      class: `mark${hollow ? " hollow" : ""}${point && point.id === data.winner ? " winner" : ""}`,
      style: `--ink: ${INKS[series % 5]}`,
    };
    if (point) attributes["data-id"] = point.id;
    const node = add(axes.svg, "path", attributes);
    add(node, "title", {}, title || words(point));
    return node;
  }

  function line(axes, coordinates, series, extra = {}) {
    const known = coordinates.filter(([, y]) => y !== null);
    if (known.length < 2) return;
    const d = known.map(([x, y], i) => `${i ? "L" : "M"}${axes.x(x)} ${axes.y(y)}`).join("");
    add(axes.svg, "path", {
      d, class: "line", style: `--ink: ${INKS[series % 5]}`, "stroke-dasharray": DASHES[series % 5], ...extra,
    });
  }

  function level(axes, value, label) {
    if (value === null || value === undefined) return;
    add(axes.svg, "path", { d: `M${axes.left} ${axes.y(value)}H${axes.right}`, class: "level" });
    add(axes.svg, "text", { x: axes.right - 2, y: axes.y(value) - 4, class: "tick end" }, label);
  }

  function legend(box, names, filled = []) {
    const list = add(box, "p", { class: "legend" });
    names.forEach((name, series) => {
      const item = add(list, "span");
      const svg = add(item, "svg", { viewBox: "-13 -6 26 12", width: 26, height: 12, "aria-hidden": "true" });
      add(svg, "path", { d: "M-13 0H13", class: "line", style: `--ink: ${INKS[series % 5]}`,
        "stroke-dasharray": DASHES[series % 5] });
      add(svg, "path", { d: SHAPES[series % 5](4), class: "mark", style: `--ink: ${INKS[series % 5]}` });
      item.append(` ${name}`);
    });
    for (const name of filled) {
      const item = add(list, "span");
      add(item, "i", { class: "shade" });
      item.append(` ${name}`);
    }
  }

  const groups = (items, key) => {
    const found = new Map();
    for (const item of items) found.set(key(item), [...(found.get(key(item)) || []), item]);
    return found;
  };
  const levels = data.yardsticks;

  function placement(box) {
    const known = data.placements;
    if (!known.length) return false;
    const kinds = [...groups(known, (p) => p.kind)];
    const axes = frame(box, {
      xs: known.map((p) => p.adapter_blocks), xLabel: "adapter blocks", yLabel: quality,
      ys: [...known.map((p) => p.value), levels.full_fine_tuned, levels.full_zero_shot],
      fixed: [...new Set(known.map((p) => p.adapter_blocks))],
    });
    level(axes, levels.full_fine_tuned, levels.full_fine_tuned_label);
    level(axes, levels.full_zero_shot, "full model as it is");
    kinds.forEach(([, members], series) => {
      const sorted = [...members].sort((a, b) => a.adapter_blocks - b.adapter_blocks);
      line(axes, sorted.map((p) => [p.adapter_blocks, p.value]), series);
      for (const p of sorted) {
        mark(axes, null, p.adapter_blocks, p.value, series, {
          title: `${p.kind}, blocks ${p.blocks}: ${shown(p.value)}`,
        });
      }
    });
    legend(box, kinds.map(([kind]) => kind));
    return true;
  }

  // Number that a compression is told by (prune:0.5), else how much of the model is shipped.
  function strength(point) {
    if (point.compress === "none") return [point.emulator_blocks, "emulator blocks"];
    const number = /:([\d.]+)$/.exec(point.compress);
    if (number) return [Number(number[1]), point.compress.split(":")[0]];
    return [point.share === null ? null : 100 * point.share, "percent of the full model shipped"];
  }

  function compression(box) {
    const named = groups(points, (p) => [
      p.compress === "none" ? `${p.select} drop` : p.compress.split(":")[0],
      p.compress === "none" ? "" : `${p.emulator_blocks} emulator blocks`,
      p.steps ? `${p.steps} steps` : "", p.method === "full" ? "" : p.method,
      `${p.placement}, ${p.adapter_blocks} adapter blocks`,
      p.learning_rate === null ? "" : `lr ${p.learning_rate}`, p.other,
    ].filter(Boolean).join(", "));
    const panels = [...named].filter(([, members]) =>
      new Set(members.map((p) => strength(p)[0])).size > 1).slice(0, 12);
    box.replaceChildren();
    // All at once, because the width of each depends on how many there are.
    const figures = panels.map(() => add(box, "figure"));
    panels.forEach(([name, members], place) => {
      const figure = figures[place];
      add(figure, "figcaption", {}, name);
      const inner = add(figure, "div");
      const sorted = [...members].sort((a, b) => strength(a)[0] - strength(b)[0]);
      const of = (setting) => sorted.map((p) => [strength(p)[0], mean(p[setting])]);
      const series = ["plug_in", "emulator_fine_tuned", "bound"];
      const axes = frame(inner, {
        xs: sorted.map((p) => strength(p)[0]), xLabel: strength(sorted[0])[1], yLabel: quality,
        ys: [...series.flatMap((s) => of(s).map(([, v]) => v)), levels.full_zero_shot],
        fixed: [...new Set(sorted.map((p) => strength(p)[0]))],
      });
      const both = sorted.filter((p) => mean(p.plug_in) !== null && mean(p.emulator_fine_tuned) !== null);
      const at = (setting) => (p) => `${axes.x(strength(p)[0])} ${axes.y(mean(p[setting]))}`;
      if (both.length > 1) {
        const there = both.map(at("plug_in"));
        const back = [...both].reverse().map(at("emulator_fine_tuned"));
        add(axes.svg, "path", { d: `M${[...there, ...back].join("L")}Z`, class: "gap" });
      }
      level(axes, levels.full_zero_shot, "full model as it is");
      series.forEach((setting, i) => {
        line(axes, of(setting), i);
        for (const p of sorted) if (mean(p[setting]) !== null) mark(axes, p, strength(p)[0], mean(p[setting]), i);
      });
      legend(figure, ["plug-in", "emulator, fine-tuned", "bound"], ["privacy gap"]);
    });
    return panels.length > 0;
  }

  const worth = (point, weight) => {
    const [utility, privacy] = [mean(point[data.utility]), mean(point.privacy_gap)];
    return utility === null || privacy === null ? null : weight * privacy - (1 - weight) * utility;
  };

  function knob(box) {
    const kinds = new Map(data.kinds.map(([name, ids]) => [name, ids.map((id) => byId.get(id))]));
    const rated = [...new Set([...kinds.values()].flat())];
    if (!rated.length) return false;
    const gaps = [data.utility, "privacy_gap"];
    const yardstick = data.utility === "bound_gap" ? "the bound" : "full fine-tuning";
    const [slider, choice, said] = ["weight", "kind", "chosen"].map((id) => document.getElementById(id));
    const best = (weight) => rated.reduce((a, b) => (worth(b, weight) > worth(a, weight) ? b : a));
    const kindOf = (point) => [...kinds].find(([, members]) => members.includes(point))[0];
    if (!choice.options.length) {
      for (const name of kinds.keys()) add(choice, "option", { value: name }, name);
      slider.value = data.weight;
      choice.value = kindOf(best(data.weight));
      choice.addEventListener("input", draw);
      slider.addEventListener("input", () => {
        choice.value = kindOf(best(Number(slider.value)));
        draw();
      });
    }
    function draw() {
      const weight = Number(slider.value);
      const point = best(weight);
      said.textContent = `At ${weight.toFixed(2)}: ${words(point)}; utility gap to ${yardstick} `
        + `${pair(point[data.utility])}, privacy gap ${pair(point.privacy_gap)}.`;
      const sorted = [...kinds.get(choice.value)].sort((a, b) => a.steps - b.steps);
      const of = (gap) => sorted.map((p) => [p.steps, mean(p[gap])]);
      const axes = frame(box, {
        xs: sorted.map((p) => p.steps), xLabel: "steps of distillation", yLabel: data.unit, zero: true,
        ys: gaps.flatMap((gap) => of(gap).map(([, v]) => v)),
        fixed: [...new Set(sorted.map((p) => p.steps))],
      });
      if (sorted.includes(point)) {
        add(axes.svg, "path", { d: `M${axes.x(point.steps)} 10V228`, class: "level chosen" });
      }
      gaps.forEach((gap, i) => {
        line(axes, of(gap), i);
        for (const p of sorted) if (mean(p[gap]) !== null) mark(axes, p, p.steps, mean(p[gap]), i);
      });
      legend(box, [`utility gap: ${yardstick} ahead of plug-in`, "privacy gap: plug-in ahead of emulator"]);
    }
    draw();
    return true;
  }

  function pareto(box) {
    const known = points.filter((p) => mean(p.plug_in) !== null && mean(p.emulator_fine_tuned) !== null);
    if (!known.length) return false;
    const axes = frame(box, {
      xs: known.map((p) => mean(p.emulator_fine_tuned)), ys: known.map((p) => mean(p.plug_in)),
      xLabel: `emulator, fine-tuned: ${data.unit}`, yLabel: `plug-in: ${data.unit}`, height: 330,
    });
    const most = Math.max(...known.map((p) => p.bytes || 0), 1);
    for (const p of [...known].sort((a, b) => a.front - b.front)) {
      const node = mark(axes, p, mean(p.emulator_fine_tuned), mean(p.plug_in), p.front ? 1 : 0, {
        r: 3.5 + 4 * Math.sqrt((p.bytes || 0) / most), hollow: !p.front,
      });
      node.setAttribute("tabindex", "0");
    }
    const corner = data.lower ? "down and to the right" : "up and to the left";
    add(box, "p", { class: "legend" }, `Better is ${corner}. Filled squares: on the front. Larger: `
      + "more bytes shipped. Ringed: the winner.");
    return true;
  }

  function parallel(box) {
    if (points.length < 2) return false;
    const axes = [
      ["adapter blocks", (p) => p.adapter_blocks], ["emulator blocks", (p) => p.emulator_blocks],
      ["selection", (p) => p.select], ["compression", (p) => p.compress], ["steps", (p) => p.steps],
      ["method", (p) => p.method], ["learning rate", (p) => p.learning_rate],
      ["plug-in", (p) => mean(p.plug_in)], ["gap to bound", (p) => mean(p.bound_gap)],
      ["privacy gap", (p) => mean(p.privacy_gap)], ["MiB shipped", (p) => p.bytes && p.bytes / 2 ** 20],
    ].filter(([, of]) => new Set(points.map(of)).size > 1);
    box.replaceChildren();
    const width = Math.max(box.clientWidth, axes.length * 96);
    const [height, top, bottom] = [300, 42, 22];
    const svg = add(box, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": "every emulator as a line over its settings and results" });
    const place = (i) => 48 + (i * (width - 96)) / Math.max(1, axes.length - 1);
    const scales = axes.map(([, of]) => {
      const values = points.map(of).filter((v) => v !== null);
      if (values.some((v) => typeof v === "string")) {
        const names = [...new Set(values)].sort();
        return { at: (v) => (names.length > 1 ? names.indexOf(v) / (names.length - 1) : 0.5), names };
      }
      const [low, high] = [Math.min(...values), Math.max(...values)];
      return { at: (v) => (v - low) / (high - low || 1), ends: [low, high] };
    });
    const y = (share) => height - bottom - share * (height - top - bottom);
    for (const p of [...points].sort((a, b) => a.front - b.front)) {
      const d = axes.map(([, of], i) => (of(p) === null ? null : `${place(i)} ${y(scales[i].at(of(p)))}`))
        .filter(Boolean).join("L");
      const node = add(svg, "path", { d: `M${d}`, "data-id": p.id,
        class: `thread${p.front ? " front" : ""}${p.id === data.winner ? " winner" : ""}` });
      add(node, "title", {}, words(p));
    }
    axes.forEach(([name], i) => {
      add(svg, "path", { d: `M${place(i)} ${y(0)}V${y(1)}`, class: "rule strong" });
      add(svg, "text", { x: place(i), y: 14, class: "axis middle" }, name);
      const { names, ends } = scales[i];
      const told = names ? names.map((n) => [n, scales[i].at(n)])
        : [[String(Number(ends[0].toPrecision(4))), 0], [String(Number(ends[1].toPrecision(4))), 1]];
      for (const [text, share] of told) {
        const dy = share === 0 ? 15 : share === 1 ? -6 : 4;
        add(svg, "text", { x: place(i) + (dy === 4 ? 6 : 0), y: y(share) + dy,
          class: `tick ${dy === 4 ? "" : "middle"}` }, text.slice(0, 16));
      }
    });
    return true;
  }

  // One emulator is pointed at in every plot and in the table at once.
  const detail = document.getElementById("detail");
  function point(id) {
    for (const node of document.querySelectorAll(".on")) node.classList.remove("on");
    const found = byId.get(id);
    detail.hidden = !found;
    if (!found) return;
    for (const node of document.querySelectorAll(`[data-id="${CSS.escape(id)}"]`)) node.classList.add("on");
    detail.textContent = `${words(found)}${found.control ? ` (${found.control} control)` : ""}`
      + ` \u2014 plug-in ${pair(found.plug_in)}, emulator ${pair(found.emulator_fine_tuned)},`
      + ` gap to bound ${pair(found.bound_gap)}, privacy gap ${pair(found.privacy_gap)}, ${size(found.bytes)}`
      + [found.deep, found.other].filter(Boolean).map((text) => `; ${text}`).join("");
  }
  const idOf = (event) => event.target.closest?.("[data-id]")?.dataset.id;
  for (const name of ["mouseover", "focusin", "click"]) {
    document.addEventListener(name, (event) => {
      const id = idOf(event);
      if (id || name === "click") point(id);
    });
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && point(undefined));

  const body = document.querySelector("#points tbody");
  for (const button of document.querySelectorAll("#points th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => {
        const text = row.children[head.cellIndex].dataset.value;
        return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
      };
      const order = (a, b) => {
        const [first, second] = [value(a), value(b)];
        if (first === null || second === null) return (first === null) - (second === null);
        return (first > second ? 1 : first < second ? -1 : 0) * (up ? 1 : -1);
      };
      body.append(...[...body.rows].sort(order));
    });
  }

  function drawAll() {
    for (const [id, draw] of Object.entries({ placement, compression, knob, pareto, parallel })) {
      const section = document.getElementById(id);
      section.hidden = false;
      section.hidden = !draw(section.querySelector(".plot"));
    }
  }
  let drawn = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === drawn) return;
    drawn = document.body.clientWidth;
    drawAll();
  }).observe(document.body);
  drawn = document.body.clientWidth;
  drawAll();
  document.documentElement.dataset.drawn = "yes";
})();
