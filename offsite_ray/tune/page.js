// SPDX-License-Identifier: Apache-2.0
// Draws the plots of a sweep from the numbers in its page. Asks the network for nothing.
(() => {
  const { SVG, add, frame, strips, mark, line, level, gap, gaps, legend } = drawing;
  const data = JSON.parse(document.getElementById("data").textContent);
  const points = data.points;
  const byId = new Map(points.map((point) => [point.id, point]));
  const better = data.lower ? "lower is better" : "higher is better";
  const quality = `${data.unit} (${better})`;
  const DASH = "\u2013";

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
        mark(axes, p.adapter_blocks, p.value, series, {
          title: `${p.kind}, blocks ${p.blocks}: ${shown(p.value)}`,
        });
      }
    });
    legend(box, kinds.map(([kind]) => kind));
    return true;
  }

  const SETTINGS = ["plug_in", "emulator_fine_tuned", "bound"];
  const NAMES = ["plug-in", "emulator, fine-tuned", "bound"];
  const lead = (point) => mean(point.privacy_gap);
  const dot = (axes, p, x, y, series, extra = {}) =>
    mark(axes, x, y, series, { id: p.id, winner: p.id === data.winner, title: words(p), ...extra });

  // Says what the areas of a plot are, of those that it has.
  function areas(known) {
    const found = [];
    if (known.some((p) => lead(p) > 0)) found.push(["privacy gap", true]);
    if (known.some((p) => lead(p) < 0)) found.push(["emulator ahead: nothing protected", false]);
    return found;
  }

  function panel(figure, series) {
    const caption = add(figure, "figcaption", {}, series.name);
    if (series.rest) add(caption, "small", {}, series.rest);
    const on = series.points.map(([x, id]) => [x, byId.get(id)]);
    const of = (setting) => on.map(([x, p]) => [x, mean(p[setting])]);
    const axes = frame(add(figure, "div"), {
      xs: on.map(([x]) => x), xLabel: series.axis, yLabel: quality, log: series.log,
      ys: [...SETTINGS.flatMap((s) => of(s).map(([, v]) => v)), levels.full_zero_shot],
      fixed: [...new Set(on.map(([x]) => x))],
    });
    gaps(axes, on.map(([x, p]) => [x, mean(p.plug_in), mean(p.emulator_fine_tuned), lead(p)]));
    level(axes, levels.full_zero_shot, "full model as it is");
    SETTINGS.forEach((setting, i) => {
      line(axes, of(setting), i);
      for (const [x, p] of on) if (mean(p[setting]) !== null) dot(axes, p, x, mean(p[setting]), i);
    });
    legend(figure, NAMES, areas(on.map(([, p]) => p)));
  }

  // Emulators that no number puts on an axis, one below the other.
  function list(figure, groups) {
    const all = groups.flatMap((group) => group.rows.map(([, id]) => byId.get(id)));
    add(add(figure, "figcaption", {}, "Side by side"), "small", {},
      `${all.length} emulators, each group alike but for selection and compression; the best plug-in first`);
    const box = add(figure, "div", { class: "rows", tabindex: 0 });
    const head = add(box, "div", { class: "row head" });
    add(head, "span");
    const cell = add(head, "span");
    const values = all.flatMap((p) => SETTINGS.map((s) => mean(p[s])));
    const { strip, scale } = strips(Math.max(240, cell.clientWidth), values);
    scale(cell, quality);
    for (const group of groups) {
      if (group.name) add(box, "p", { class: "group" }, group.name);
      for (const [name, id] of group.rows) {
        const p = byId.get(id);
        const row = add(box, "div", { class: "row", "data-id": id });
        add(row, "span", {}, name);
        const axes = strip(add(row, "span"), 24, words(p));
        const [plug_in, emulator] = SETTINGS.map((s) => mean(p[s]));
        if (![plug_in, emulator, lead(p)].includes(null)) {
          const [xa, xb] = [plug_in, emulator].map(axes.x).sort((a, b) => a - b);
          gap(axes.svg, [xa, 7, 17], [xb, 7, 17], lead(p) >= 0);
        }
        SETTINGS.forEach((s, i) => mean(p[s]) !== null && dot(axes, p, mean(p[s]), 12, i));
      }
    }
    legend(figure, NAMES, areas(all));
  }

  function compression(box) {
    const { lines, rows } = data.compression;
    box.replaceChildren();
    // All at once, because the width of each depends on how many there are.
    const figures = lines.map(() => add(box, "figure"));
    lines.forEach((series, i) => panel(figures[i], series));
    if (rows.length) list(add(box, "figure", { class: "whole" }), rows);
    return lines.length + rows.length > 0;
  }

  const worth = (point, weight) => {
    const [utility, privacy] = [point.behind, mean(point.privacy_gap)];
    return utility === null || privacy === null ? null : weight * privacy - (1 - weight) * utility;
  };

  function knob(box) {
    const kinds = new Map(data.kinds.map(([name, ids]) => [name, ids.map((id) => byId.get(id))]));
    const rated = [...new Set([...kinds.values()].flat())];
    if (!rated.length) return false;
    const both = [data.utility, "privacy_gap"];
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
        ys: both.flatMap((gap) => of(gap).map(([, v]) => v)),
        fixed: [...new Set(sorted.map((p) => p.steps))],
      });
      if (sorted.includes(point)) {
        add(axes.svg, "path", { d: `M${axes.x(point.steps)} 10V228`, class: "level chosen" });
      }
      gaps(axes, sorted.map((p) => [p.steps, lead(p), 0, lead(p)]));
      both.forEach((gap, i) => {
        line(axes, of(gap), i);
        for (const p of sorted) if (mean(p[gap]) !== null) dot(axes, p, p.steps, mean(p[gap]), i);
      });
      legend(box, [`utility gap: ${yardstick} ahead of plug-in`, "plug-in ahead of emulator"], areas(sorted));
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
      const node = dot(axes, p, mean(p.emulator_fine_tuned), mean(p.plug_in), p.front ? 1 : 0, {
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
    const axes = [
      ["adapter blocks", (p) => p.adapter_blocks], ["emulator blocks", (p) => p.emulator_blocks],
      ["selection", (p) => p.select], ["compression", (p) => p.compress], ["steps", (p) => p.steps],
      ["method", (p) => p.method], ["learning rate", (p) => p.learning_rate],
      ["plug-in", (p) => mean(p.plug_in)], ["gap to bound", (p) => mean(p.bound_gap)],
      ["privacy gap", (p) => mean(p.privacy_gap)], ["MiB shipped", (p) => p.bytes && p.bytes / 2 ** 20],
    ].filter(([, of]) => new Set(points.map(of)).size > 1);
    if (!axes.length) return false;
    const scales = axes.map(([, of]) => {
      const values = points.map(of).filter((v) => v !== null);
      if (values.some((v) => typeof v === "string")) {
        const names = [...new Set(values)].sort();
        // Words stand to the right of their axis and take room there.
        const room = Math.max(86, 22 + 6.4 * Math.max(...names.map((name) => name.length)));
        return { at: (v) => (names.length > 1 ? names.indexOf(v) / (names.length - 1) : 0.5), names, room };
      }
      const [low, high] = [Math.min(...values), Math.max(...values)];
      return { at: (v) => (v - low) / (high - low || 1), ends: [low, high], room: 86 };
    });
    const starts = scales.map((_, i) => scales.slice(0, i).reduce((sum, { room }) => sum + room, 0));
    const last = starts.at(-1) + scales.at(-1).room - 86;
    box.replaceChildren();
    const width = Math.max(box.clientWidth, last + 96);
    const most = Math.max(...scales.map(({ names }) => (names ? names.length : 0)));
    const [height, top, bottom] = [Math.max(300, 64 + 17 * most), 42, 22];
    const svg = add(box, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": "every emulator as a line over its settings and results" });
    const place = (i) => 48 + (starts[i] * (width - 96)) / Math.max(1, last);
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
        const dy = names ? 4 : share === 0 ? 15 : -6;
        add(svg, "text", { x: place(i) + (names ? 6 : 0), y: y(share) + dy,
          class: `tick ${names ? "" : "middle"}` }, text);
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
