// SPDX-License-Identifier: Apache-2.0
// What plots are made of: frames, marks, lines, areas, legends. Knows nothing of sweeps.
"use strict";
const drawing = (() => {
  const SVG = document.getElementById("blank").namespaceURI;

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
  const ink = (series) => `--ink: ${INKS[series % 5]}`;
  // Beyond five series a colour comes again, with another shape and another dash.
  const shape = (series, r) => SHAPES[(series + Math.floor(series / 5)) % 5](r);
  const dash = (series) => DASHES[(series + Math.floor(series / 5)) % 5];
  const number = (value) => String(value).replace("-", "\u2212");

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

  // Bounds of an axis that has all values, with some room at both ends.
  function span(values) {
    const known = values.filter((v) => v !== null && Number.isFinite(v));
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [low - room, high + room];
  }

  // A frame with axes: `x` and `y` map values to pixels. `fixed` are ticks of a numbered axis.
  function frame(box, { xs, ys, xLabel, yLabel, height = 270, fixed = null, zero = false, log = false }) {
    box.replaceChildren();
    const width = Math.max(260, box.clientWidth);
    const [left, right, top, bottom] = [54, 12, 10, 42];
    const svg = add(box, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
    svg.setAttribute("aria-label", `${yLabel} over ${xLabel}`);
    const along = log ? Math.log10 : (v) => v;
    const [[x0, x1], [y0, y1]] = [span(xs.map(along)), span(zero ? [...ys, 0] : ys)];
    const x = (v) => left + ((along(v) - x0) / (x1 - x0)) * (width - left - right);
    const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
    for (const v of ticks(y0, y1, 5)) {
      const rule = v === 0 && zero ? "rule strong" : "rule";
      add(svg, "path", { d: `M${left} ${y(v)}H${width - right}`, class: rule });
      add(svg, "text", { x: left - 6, y: y(v) + 4, class: "tick end" }, number(v));
    }
    let free = 0;
    for (const v of [...(fixed || ticks(x0, x1, width < 420 ? 4 : 7))].sort((a, b) => a - b)) {
      if (along(v) < x0 || along(v) > x1) continue;
      add(svg, "path", { d: `M${x(v)} ${height - bottom}v4`, class: "rule strong" });
      const half = 3.5 * String(v).length;
      // Where two would touch, the tick alone stands for the second.
      if (x(v) - half < free) continue;
      add(svg, "text", { x: x(v), y: height - bottom + 16, class: "tick middle" }, number(v));
      free = x(v) + half + 3;
    }
    add(svg, "text", { x: (left + width - right) / 2, y: height - 6, class: "axis middle" }, xLabel);
    add(svg, "text", {
      transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, class: "axis middle",
    }, yLabel);
    return { svg, x, y, left, right: width - right };
  }

  // An axis from left to right for many strips below each other, each as wide as the box.
  function strips(width, values) {
    const [low, high] = span(values);
    const [left, right] = [14, 14];
    const x = (v) => left + ((v - low) / (high - low)) * (width - left - right);
    const marked = ticks(low, high, width < 420 ? 4 : 8);
    const strip = (box, height, label) => {
      const svg = add(box, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
      svg.setAttribute("aria-label", label);
      for (const v of marked) add(svg, "path", { d: `M${x(v)} 0V${height}`, class: "rule" });
      return { svg, x, y: (v) => v };
    };
    const scale = (box, label) => {
      const svg = add(box, "svg", { viewBox: `0 0 ${width} 34`, width, height: 34, role: "img" });
      svg.setAttribute("aria-label", label);
      for (const v of marked) add(svg, "text", { x: x(v), y: 30, class: "tick middle" }, number(v));
      add(svg, "text", { x: width / 2, y: 12, class: "axis middle" }, label);
    };
    return { strip, scale };
  }

  function mark(axes, x, y, series, { r = 5, hollow = false, winner = false, id, title }) {
    const node = add(axes.svg, "path", {
      d: shape(series, r),
      transform: `translate(${axes.x(x)} ${axes.y(y)})`,
      class: `mark${hollow ? " hollow" : ""}${winner ? " winner" : ""}`,
      style: ink(series),
    });
    if (id !== undefined) node.setAttribute("data-id", id);
    add(node, "title", {}, title);
    return node;
  }

  function line(axes, coordinates, series) {
    const known = coordinates.filter(([, y]) => y !== null);
    if (known.length < 2) return;
    const d = known.map(([x, y], i) => `${i ? "L" : "M"}${axes.x(x)} ${axes.y(y)}`).join("");
    add(axes.svg, "path", { d, class: "line", style: ink(series), "stroke-dasharray": dash(series) });
  }

  function level(axes, value, label) {
    if (value === null || value === undefined) return;
    add(axes.svg, "path", { d: `M${axes.left} ${axes.y(value)}H${axes.right}`, class: "level" });
    add(axes.svg, "text", { x: axes.right - 2, y: axes.y(value) - 4, class: "tick end" }, label);
  }

  // An area between two edges, each [x, y of the one, y of the other] in pixels: a tint where the
  // gap is open, upright stripes where it is turned round, so that no colour need tell them apart.
  function gap(svg, [xa, ya, za], [xb, yb, zb], open) {
    const outline = `M${xa} ${ya}L${xb} ${yb}L${xb} ${zb}L${xa} ${za}Z`;
    add(svg, "path", { d: outline, class: open ? "gap" : "gap turned" });
    if (open) return;
    const stripes = [];
    for (let x = Math.ceil(xa / 5) * 5; x <= xb; x += 5) {
      const share = (x - xa) / (xb - xa || 1);
      stripes.push(`M${x} ${ya + share * (yb - ya)}V${za + share * (zb - za)}`);
    }
    add(svg, "path", { d: stripes.join(""), class: "stripes" });
  }

  // Such areas along a line of [x, y of the one, y of the other, how far the gap is open], cut where
  // the gap is closed. Nothing is drawn beside what is not known.
  function gaps(axes, along) {
    along.slice(1).forEach((next, i) => {
      const last = along[i];
      if ([...last, ...next].some((value) => value === null)) return;
      const [a, b] = [last, next].map(([x, y, z]) => [axes.x(x), axes.y(y), axes.y(z)]);
      const [from, to] = [last[3], next[3]];
      if (from * to >= 0) {
        gap(axes.svg, a, b, from + to >= 0);
        return;
      }
      const closed = a.map((value, k) => value + (from / (from - to)) * (b[k] - value));
      gap(axes.svg, a, closed, from > 0);
      gap(axes.svg, closed, b, to > 0);
    });
  }

  function legend(box, names, areas = []) {
    const list = add(box, "p", { class: "legend" });
    names.forEach((name, series) => {
      const item = add(list, "span");
      const svg = add(item, "svg", { viewBox: "-13 -6 26 12", width: 26, height: 12, "aria-hidden": "true" });
      add(svg, "path", { d: "M-13 0H13", class: "line", style: ink(series), "stroke-dasharray": dash(series) });
      add(svg, "path", { d: shape(series, 4), class: "mark", style: ink(series) });
      item.append(` ${name}`);
    });
    for (const [name, open] of areas) {
      const item = add(list, "span");
      add(item, "i", { class: open ? "shade" : "shade turned" });
      item.append(` ${name}`);
    }
  }

  return { SVG, add, frame, strips, mark, line, level, gap, gaps, legend };
})();
