"use strict";
// Shared by both pages. Whatever a model wrote enters the page as textContent, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";

/** An element with attributes, a text and children. */
function el(name, attributes = {}, text = null, ...children) {
  const e = name.startsWith("svg:") ? document.createElementNS(NS, name.slice(4))
                                    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  if (text !== null) e.textContent = text;
  e.append(...children);
  return e;
}

/** A text whose control characters and direction marks can be seen and do nothing. */
function visible(text) {
  return text.replace(/\n/g, "\u23ce").replace(
    /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/g,
    c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

const dark = matchMedia("(prefers-color-scheme: dark)").matches;

/** A shade for a number in [-1, 1]: orange below 0, blue above. */
function shade(x) {
  if (x === null || Number.isNaN(x)) return "transparent";
  const strength = Math.min(1, Math.abs(x)) * (dark ? 0.75 : 0.6);
  return `rgba(${x < 0 ? "235,125,20" : "30,120,235"},${strength.toFixed(3)})`;
}

function number(x, digits = 4) {
  if (x === null || x === undefined) return "\u2013";
  if (typeof x !== "number") return String(x);
  if (x !== 0 && Math.abs(x) < 1e-3) return x.toExponential(Math.max(2, digits - 3));
  return String(+x.toFixed(digits));
}

/** Arrow keys walk through the `.token` children of an element; `show(token)` tells about one. */
function walk(box, show) {
  let here = null;
  const go = token => {
    document.querySelectorAll(".token.here").forEach(t => t.classList.remove("here"));
    if (here) here.removeAttribute("id");
    here = token;
    token.classList.add("here");
    token.id = `here-${box.getAttribute("aria-label") || "cells"}`.replace(/\W/g, "-");
    box.setAttribute("aria-activedescendant", token.id);
    show(token);
  };
  box.tabIndex = 0;
  box.addEventListener("mouseover", e => {
    const token = e.target.closest(".token");
    if (token) go(token);
  });
  box.addEventListener("focus", () => {
    const first = here || box.querySelector(".token");
    if (first) go(first);
  });
  box.addEventListener("keydown", e => {
    const tokens = [...box.querySelectorAll(".token")], at = tokens.indexOf(here);
    const wide = +box.dataset.columns || tokens.length;
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, ArrowUp: at - wide, ArrowDown: at + wide,
      Home: 0, End: tokens.length - 1}[e.key];
    if (to === undefined || !tokens[to]) return;
    e.preventDefault();
    go(tokens[to]);
  });
}

/** What a line looks like, in small. */
function sample(line) {
  const svg = el("svg:svg", {viewBox: "0 0 26 10", "aria-hidden": "true"},  null,
    el("svg:line", {x1: 0, x2: 26, y1: 5, y2: 5, stroke: `var(${line.color})`, "stroke-width": 2,
      "stroke-dasharray": line.dash || "none", opacity: line.opacity || 1}));
  if (line.dots) svg.append(el("svg:circle", {cx: 13, cy: 5, r: 3, fill: `var(${line.color})`}));
  return svg;
}

/** The highest y that a chart shows: a lone spike must not flatten the rest. */
function ceiling(ys) {
  const sorted = [...ys].sort((a, b) => a - b), high = sorted[Math.floor(0.9 * (sorted.length - 1))];
  const top = sorted[sorted.length - 1];
  return sorted.length > 9 && high > 0 && top > 3 * high ? 1.5 * high : top;
}

/** Lines over steps as an svg. lines: [{points: [[x, y]], color, dash, dots, label}]. */
function chart(title, lines, note = "") {
  const W = 340, H = 170, L = 42, R = 8, T = 8, B = 22;
  const points = lines.flatMap(l => l.points).filter(p => p[1] !== null);
  const figure = el("figure", {}, null, el("figcaption", {}, title));
  if (!points.length) return {figure, cursor() {}};
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = Math.min(...ys), y1 = ceiling(ys);
  if (y0 >= 0 && y0 < 0.5 * y1) y0 = 0;
  if (y0 === y1) y1 = y0 + 1;
  const X = x => L + (x - x0) / (x1 - x0) * (W - L - R), Y = y => T + (y1 - Math.min(y, y1)) / (y1 - y0) * (H - T - B);
  const svg = el("svg:svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title});
  for (const y of [y0, (y0 + y1) / 2, y1]) {
    svg.append(el("svg:line", {class: "axis", x1: L, x2: W - R, y1: Y(y), y2: Y(y)}),
               el("svg:text", {x: L - 4, y: Y(y) + 4, "text-anchor": "end"}, number(y, 2)));
  }
  for (const [x, anchor] of [[x0, "start"], [x1, "end"]]) {
    svg.append(el("svg:text", {x: X(x), y: H - 6, "text-anchor": anchor}, x));
  }
  for (const line of lines) {
    const real = line.points.filter(p => p[1] !== null);
    const path = real.map(p => `${X(p[0]).toFixed(1)},${Y(p[1]).toFixed(1)}`).join(" ");
    svg.append(el("svg:polyline", {points: path, fill: "none", stroke: `var(${line.color})`,
      "stroke-width": 1.6, "stroke-dasharray": line.dash || "none", opacity: line.opacity || 1}));
    if (line.dots) for (const p of real) {
      svg.append(el("svg:circle", {cx: X(p[0]), cy: Y(p[1]), r: 3, fill: `var(${line.color})`}));
    }
  }
  const mark = el("svg:line", {class: "cursor", y1: T, y2: H - B, x1: -9, x2: -9});
  svg.append(mark);
  figure.append(svg);
  const spikes = points.filter(p => p[1] > y1);
  for (const p of spikes) {
    svg.append(el("svg:path", {class: "spike", d: `M${X(p[0]) - 4},${T + 7} h8 l-4,-7 z`}));
  }
  const labelled = lines.filter(l => l.label && l.points.some(p => p[1] !== null));
  if (labelled.length > 1) figure.append(el("figcaption", {class: "key"}, null,
    ...labelled.map(l => el("span", {}, null, sample(l), l.label))));
  if (spikes.length) figure.append(el("figcaption", {class: "spikes"}, "beyond the frame: "
    + spikes.slice(0, 4).map(p => `${number(p[1], 1)} at ${p[0]}`).join(", ")
    + (spikes.length > 4 ? ", \u2026" : "")));
  if (note) figure.append(el("figcaption", {}, note));
  return {figure, svg, at: px => x0 + (px - L) / (W - L - R) * (x1 - x0), width: W, cursor(x) {
    mark.setAttribute("x1", X(x));
    mark.setAttribute("x2", X(x));
  }};
}
