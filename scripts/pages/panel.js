"use strict";
// The panel of one token: sentences, HAPO's formulas with this token's numbers, and two pictures. In
// a formula's text _{} and ^{} mark indices.

const MISSING = "missing in this run's file", signed = text => text.replace(/^-/, "−");
const num = (x, digits) => signed(number(x, digits));
const term = x => (x < 0 ? `(${num(x)})` : num(x));  // a number inside a formula

/** The lines of the panel. Each is {stage of train_step, name, formula, numbers, value}. */
function panelLines(v, c) {
  const {s, byToken, byResponse} = c, layer = c.group.stats.layer, pi = layer ? `π^{${layer}}` : "π";
  const P = v.stats || {}, Q = v.before || {}, above = has(v.x) && v.stats && v.x > P.pivot;
  const edge = above ? "h_{max}" : "h_{min}", scale = above || s.released ? P[above ? "h_max" : "h_min"] : -P.h_min;
  const scaleName = above || s.released ? edge : `|${edge}|`, mean = {token: "1 / N", sequence: "1 / (n B)", fixed: "1 / (cap B)"};
  const own = (name, text) => (v.other.includes(name) ? "as recorded: this run has its own rule" : text);
  const bound = (name, on) => own(name, s.D ? on : "D is off"), winner = v.clipped < v.unclipped ? "clipped" : "unclipped";
  const without = s.baseline === "cispo" && !s.D ? "this run has no clip bounds" : MISSING;
  const lines = [], line = (stage, name, formula, numbers, value) => lines.push(
    {stage, name, formula, numbers: has(value) ? numbers : without, value: has(value) ? value : null});
  line(1, "policy that is trained", pi, layer ? `BuPO's phase 1: the policy of layer ${layer}` : "the full policy",
    layer ? `layer ${layer}` : "full");
  line(2, "entropy", "H = −Σ p log p", "of the full policy at this position, in nats", v.H);
  line(2, "log entropy", "x = log H", `log ${term(v.H)}`, v.x);
  const below = s.released ? Q.h_min : Math.abs(Q.h_min), factor = {zscore: "z", two: "sign(x − x_{ρ}^{′})"}[s.temperature_form] || "h^{′}";
  line(2, "h by the previous batch's statistics", "h^{′} = (x − x_{ρ}^{′}) / |h^{′}|",
    `(${num(v.x)} − ${term(Q.pivot)}) / ${term(v.x > Q.pivot ? Q.h_max : below)}`, v.hBefore);
  if (c.group.step === 1) lines[lines.length - 1].numbers = "the first step has no previous batch";
  line(2, "temperature (A, Eq. 8)", !s.A ? "T = T_{base}" : `T = T_{base} (1 + τ ${factor})`,
    !s.A ? "A is off" : has(v.hBefore) ? `${num(s.temperature)} (1 + ${num(s.tau)} · ${term(v.factor)})`
      : "no statistics of a previous batch", v.T);
  line(2, "probability when it was drawn", "p = softmax(z / T)", `in the run, at T = ${num(v.drawnAt)}`, v.p);
  line(2, "reward", "R", "of its response", v.reward);
  line(3, "old log-probability", `log ${pi}_{old}`, "at T_base, before the step's updates", v.old);
  line(3, "probability at the base temperature", "exp(log π_{old})", `exp ${term(v.old)}`, v.pBase);
  line(4, "pivot", "x_{ρ}", `the ${num(s.rho)}-quantile of x over the batch`, P.pivot);
  line(4, `largest distance ${above ? "above" : "below"} the pivot`, edge, "over the batch", above ? P.h_max : P.h_min);
  line(4, "h (Eq. 6)", `h = (x − x_{ρ}) / ${scaleName}`, `(${num(v.x)} − ${term(P.pivot)}) / ${term(scale)}`, v.h);
  for (const [k, group, m, sd, name, value, names, how] of [
    ["tokens", byToken, "μ = Σ R_{i} n_{i} / Σ n_{i}", "s = √(Σ (R_{i} − μ)^{2} n_{i} / Σ n_{i})",
      "advantage by B (Eq. 9)", v.byToken, ["μ", "s"], "divided by their number"],
    ["responses", byResponse, "R_{mean}", "R_{std}", "advantage by GRPO", v.byResponse, ["R_{mean}", "R_{std}"],
      "divided by their number − 1"]]) {
    line(5, `mean over ${k}`, m, `over the ${group.n} ${k} of the group`, group.mean);
    line(5, `deviation over ${k}`, sd, `over the ${group.n} ${k}, ${how}`, group.deviation);
    line(5, name, `(R − ${names[0]}) / (${names[1]} + 10^{−6})`,
      `(${num(v.reward)} − ${term(group.mean)}) / ${term(group.deviation)}`, value);
  }
  line(5, "advantage before C", "A", s.B ? "by B" : "by GRPO", v.A);
  line(6, "new log-probability", `log ${pi}_{new}`, "after the step's last update", v.new);
  line(6, "ratio", `r = ${pi}_{new} / ${pi}_{old}`, own("ratio", `exp(${num(v.new)} − ${term(v.old)})`), v.ratio);
  line(6, "neutral zone (C)", "[1 − ε_{low}/2, 1 + ε_{high}/2]", !s.C ? "C is off"
    : `[${num(1 - v.zone[0] / 2)}, ${num(1 + v.zone[1] / 2)}]` + (s.released && s.D ? ", with D's distances" : ""), has(v.moved) ? (v.moved ? "moved" : "inside") : null);
  line(6, "advantage after C (Eq. 10, 11)", v.scaled ? "A (1 + h)" : "A",
    own("A", !s.C ? "C is off" : v.scaled ? `${num(v.A)} (1 + ${term(v.h)})` : num(v.A)), v.redistributed);
  line(6, "lower bound, plain", "1 − ε_{low}", `1 − ${num(s.clip_low)}`, 1 - s.clip_low);
  line(6, "lower bound (D, Eq. 12)", s.D ? "1 − ε_{low} (1 − min(h, 0))" : "1 − ε_{low}",
    bound("low", `1 − ${num(s.clip_low)} (1 − ${term(Math.min(v.h, 0))})`), has(v.low) ? 1 - v.low : null);
  line(6, "upper bound, plain", "1 + ε_{high}", `1 + ${num(s.clip_high)}`, 1 + s.clip_high);
  line(6, "upper bound (D, Eq. 13)", s.D ? "1 + ε_{high} (1 + max(h, 0))" : "1 + ε_{high}",
    bound("high", `1 + ${num(s.clip_high)} (1 + ${term(Math.max(v.h, 0))})`), has(v.high) ? 1 + v.high : null);
  line(6, "unclipped branch", "r A", `${num(v.ratio)} · ${term(v.redistributed)}`, v.unclipped);
  line(6, "clipped branch", "clip(r) A", `${num(v.bounded)} · ${term(v.redistributed)}`, v.clipped);
  line(6, "objective", "min(r A, clip(r) A)", v.dual ? `dual clip: ${num(s.dual_clip)} · ${term(v.redistributed)}`
    : `min(${num(v.unclipped)}, ${num(v.clipped)}): ${winner} wins`, v.objective);
  line(6, "gradient", "∂ objective / ∂ log π", v.redistributed === 0 ? "none: the advantage is 0"
    : v.dual ? "none: the dual clip is constant" : v.stopped ? "none: the clipped branch is constant" : "r A", has(v.learns) ? (v.learns ? "learns" : "stopped") : null);
  const r = c.group.responses[v.k], B = r.update_responses, N = r.tokens.length;
  line(6, "weight in the loss", mean[s.loss_mean] || "", s.loss_mean === "token" ? `1 / ${r.update_tokens} tokens of its update`
    : `1 / (${s.loss_mean === "sequence" ? `${N} tokens` : `cap ${s.max_new_tokens}`} · ${B} responses of its update)`, v.weight);
  line(6, "what it adds to the loss", "−objective · weight",
    `${num(-v.objective)} · ${num(v.weight)}, at the ratio after the last update` + (s.kl ? "; without the KL term" : ""), v.loss);
  return lines;
}

/** A sentence about the temperature of a token. */
function aboutTemperature(v, c) {
  const {s} = c, changed = c.changed && v.T !== v.drawnAt;
  if (!has(v.T)) return "Its temperature under these settings is not known from this file.";
  if (!s.A) return `Every token is drawn at T = ${num(v.T)}: mechanism A is off.`;
  if (!has(v.hBefore)) {
    return `It was drawn at T = ${num(v.T)}: ` + (c.group.step === 1 ? "the first step has no previous batch, whose statistics "
      + "mechanism A needs." : "the file does not hold the previous batch's statistics.");
  }
  if (v.T === s.temperature) return `It is drawn at the base temperature ${num(v.T)}: mechanism A changes nothing here.`;
  const side = v.T < s.temperature ? "cooler" : "hotter", where = v.x > v.before.pivot ? "above" : "below";
  const note = s.released ? " (In the released code h has the opposite sign.)" : "";
  return `Mechanism A ${changed ? "would draw" : "drew"} it at T = ${num(v.T)}, ${side} than the base ${num(s.temperature)}: its log `
    + `entropy ${num(v.x, 2)} is ${where} ${num(v.before.pivot, 2)}, the pivot of the previous batch.${note}`;
}

/** Sentences about the advantage of a token. */
function aboutAdvantage(v, c) {
  const {s} = c, average = s.B ? c.byToken : c.byResponse, what = s.B ? "tokens (mechanism B)" : "responses";
  if (v.other.includes("A")) return ["Its advantage follows a rule of this run that is not one of HAPO's formulas."];
  if (v.A === 0) return ["All outcomes of its group are equal, so its advantage is 0."];
  const told = [`Its response has reward ${num(v.reward, 2)}; the group's mean over ${what} is ${num(average.mean, 2)}, so `
    + `A = ${num(v.A, 3)}, the same for every token of the response.`];
  if (!s.C || !has(v.h) || !has(v.moved)) return told;
  const kind = `${(v.h > 0) === !s.released ? "uncertain" : "certain"} (h ${v.h > 0 ? ">" : "≤"} 0)`, place = v.moved ? "has left" : "is inside";
  const result = v.scaled ? `multiplies A by 1 + h = ${num(1 + v.h, 3)}, to ${num(v.redistributed, 3)}` : "leaves A as it is";
  return [...told, `The token is ${kind}, and its ratio ${num(v.ratio, 3)} ${place} the neutral zone: mechanism C ${result}.`];
}

/** Whether a token still has a gradient after the step, and why. */
function aboutGradient(v) {
  if (!has(v.learns)) return "whether it still learns is not known";
  if (v.redistributed === 0) return v.s.kl ? "its advantage is 0; the KL term of this run still has a gradient"
    : "it learns nothing, since its advantage is 0";
  if (v.dual) return `it has stopped learning: its ratio ${num(v.ratio, 3)} is above the dual clip ${num(v.s.dual_clip)}`;
  const ratio = `its ratio ${num(v.ratio, 3)} is`;
  if (v.learns) return `it still learns: ${ratio} not ` + (v.redistributed > 0 ? `above its upper bound ${num(1 + v.high, 3)}`
    : `below its lower bound ${num(1 - v.low, 3)}`);
  return `it has stopped learning: ${ratio} ` + (v.stopped > 0 ? `above its upper bound ${num(1 + v.high, 3)}, and its advantage is `
    + "positive" : `below its lower bound ${num(1 - v.low, 3)}, and its advantage is negative`);
}

/** Sentences that answer the first questions about a token: [stage, text]. dapo: its values under DAPO. */
function sentences(v, c, dapo) {
  const [advantage, redistributed] = aboutAdvantage(v, c), told = [[2, aboutTemperature(v, c)], [5, advantage]];
  if (redistributed) told.push([6, redistributed]);
  told.push([6, `After the step's updates ${aboutGradient(v)}.`]);
  if (!dapo || !has(dapo.low)) return told;
  return [...told, [6, `DAPO would have T = ${num(dapo.T)}, A = ${num(dapo.redistributed, 3)} and the bounds ${num(1 - dapo.low, 3)} to `
    + `${num(1 + dapo.high, 3)}; at the same ratio ${aboutGradient(dapo)}.`]];
}

/** A formula's text as MathML. */
function formula(text) {
  const node = (name, ...children) => {
    const e = document.createElementNS("http://www.w3.org/1998/Math/MathML", name);
    e.append(...children);
    return e;
  };
  const row = node("mrow"), letter = /[A-Za-z\u0300-\u03ff\u2032\u2202}]/, name = /^[A-Za-z\u0300-\u03ff\u2032|]+$/;
  const parts = text.match(/[A-Za-z\u0300-\u03ff\u2032|]+(?:[_^]\{[^}]*\})*|\d+(?:\^\{[^}]*\})?|\)\^\{[^}]*\}|\s+|./g) || [];
  for (const [at, part] of parts.entries()) {
    const base = part.replace(/[_^]\{[^}]*\}/g, "");
    let e = node(name.test(base) ? "mi" : /^\d/.test(base) ? "mn" : "mo", base);
    for (const [, kind, index] of part.matchAll(/([_^])\{([^}]*)\}/g)) {
      e = node(kind === "_" ? "msub" : "msup", e, node("mi", index));
    }
    if (part.trim()) row.append(e);
    else if (letter.test((parts[at - 1] || "").slice(-1)) && letter.test(parts[at + 1] || "")) {
      const space = node("mspace");  // between two names
      space.setAttribute("width", "0.25em");
      row.append(space);
    }
  }
  const math = node("math", row);
  math.setAttribute("aria-label", text.replace(/[_^]\{([^}]*)\}/g, " $1"));
  return math;
}

/** Where a token's ratio is: the neutral zone, the plain bounds and its own. */
function ratioPicture(v, s) {
  const W = 420, zone = [1 - v.zone[0] / 2, 1 + v.zone[1] / 2], plain = [1 - s.clip_low, 1 + s.clip_high];
  const bounds = [1 - v.low, 1 + v.high], all = [...plain, ...bounds, v.ratio];
  const x0 = Math.min(...all) - 0.1, x1 = Math.max(...all) + 0.1, X = x => 10 + (x - x0) / (x1 - x0) * (W - 20);
  const svg = el("svg:svg", {viewBox: `0 0 ${W} 62`, role: "img", class: "number-line", "aria-label":
    `ratio ${num(v.ratio)}, neutral zone ${zone.map(x => num(x)).join(" to ")}, bounds ${bounds.map(x => num(x)).join(" to ")}`});
  const mark = (x, text, y, color, dash = "none") => svg.append(
    el("svg:line", {x1: X(x), x2: X(x), y1: 22, y2: 44, stroke: `var(${color})`, "stroke-width": 2, "stroke-dasharray": dash}),
    el("svg:text", {x: X(x), y, "text-anchor": "middle"}, text));
  if (s.C) svg.append(el("svg:rect", {x: X(zone[0]), width: X(zone[1]) - X(zone[0]), y: 26, height: 14, class: "zone"}));
  svg.append(el("svg:line", {x1: 10, x2: W - 10, y1: 33, y2: 33, class: "axis"}));
  plain.forEach(x => mark(x, "", 56, "--quiet", "3 3"));
  bounds.forEach(x => mark(x, num(x, 3), 56, "--two"));
  mark(v.ratio, `r ${num(v.ratio, 3)}`, 16, "--one");
  return el("figure", {}, null, svg, el("figcaption", {}, "The ratio (blue), its bounds (orange), the plain bounds (dashed)"
    + (s.C ? " and the neutral zone of mechanism C (shaded)." : ".")));
}

/** How many of 100 tokens fall into each of `bins` equal bins of log H, from its quantiles. */
function histogram(quantiles, bins) {
  const low = quantiles[0], width = (quantiles[100] - low) / bins || 1, mass = new Array(bins).fill(0);
  const bin = x => Math.min(bins - 1, Math.floor((x - low) / width));
  for (let k = 0; k < 100; k++) {  // a hundredth of the tokens lies between two quantiles, evenly
    const [a, b] = [quantiles[k], quantiles[k + 1]];
    for (let j = bin(a); j <= bin(b); j++) {
      const overlap = Math.min(b, low + (j + 1) * width) - Math.max(a, low + j * width);
      mass[j] += bin(a) === bin(b) ? 1 : overlap / (b - a);
    }
  }
  return mass;
}

/** The distribution of log H over the step's batch. marks: [[x, label, color]]; ticks: the group's x. */
function batchPicture(quantiles, marks, ticks) {
  const W = 640, low = quantiles[0], range = quantiles[100] - low || 1, mass = histogram(quantiles, 48), top = Math.max(...mass);
  const X = x => 10 + (x - low) / range * (W - 20), anchor = x => (x < 60 ? "start" : x > W - 60 ? "end" : "middle");
  const svg = el("svg:svg", {viewBox: `0 0 ${W} 150`, role: "img", "aria-label": "distribution of log entropy over the batch, "
    + marks.map(([, label]) => label).join(", ")});
  mass.forEach((m, j) => svg.append(el("svg:rect", {class: "bin", x: 10 + j * (W - 20) / mass.length, width: (W - 20) / mass.length - 1,
    y: 110 - 90 * m / top, height: 90 * m / top})));
  const places = new Set(ticks.map(x => X(x).toFixed(0)));
  svg.append(el("svg:path", {class: "tick", d: [...places].map(x => `M${x},112v6`).join("")}));
  marks.forEach(([x, label, color], at) => svg.append(
    el("svg:line", {x1: X(x), x2: X(x), y1: 14, y2: 122, stroke: `var(${color})`, "stroke-dasharray": "4 3"}),
    el("svg:text", {x: X(x), y: at % 2 ? 146 : 134, "text-anchor": anchor(X(x))}, label)));
  return svg;
}

/** The panel of a token: sentences, picture, table. was, own: its values and context under the run's own
 * settings, if others are in force. dapo: its values under DAPO. stage: the last one to show; 0: all. */
function tokenPanel(v, c, was, own, dapo, stage) {
  const {group, run} = c, strings = group.responses[v.k].tokens, layer = group.stats.layer;
  const near = (from, to) => strings.slice(Math.max(0, from), to).map(visible).join("");
  const title = el("h3", {}, null, near(v.i - 4, v.i), el("b", {}, ` ${visible(strings[v.i]) || "∅"} `), near(v.i + 1, v.i + 5),
    el("span", {class: "quiet"}, `  ${visible(run.name)}, step ${group.step}, response ${v.k + 1}, token ${v.i + 1}`
      + (layer ? `, policy of layer ${layer}` : "")));
  const recorded = was && panelLines(was, own), value = x => (x === null ? "–" : num(x, 6));
  const body = panelLines(v, c).map((line, at) => {
    const old = recorded && recorded[at].value, changed = recorded && old !== line.value;
    return stage && line.stage > stage ? "" : el("tr", {class: stage === line.stage ? "added" : ""}, null,
      el("th", {scope: "row"}, line.name), el("td", {}, null, formula(line.formula)), el("td", {}, line.numbers),
      el("td", {class: changed ? "value changed" : "value"}, value(line.value)),
      ...(recorded ? [el("td", {class: "value old"}, value(old))] : []));
  });
  const names = ["quantity", "formula", "with this token's numbers", ...(recorded ? ["with these settings", "in the run"] : ["value"])];
  const head = el("tr", {}, null, ...names.map(name => el("th", {scope: "col"}, name)));
  const picture = has(v.objective) && (!stage || stage > 5) ? [ratioPicture(v, c.s)] : [];
  const told = el("ul", {class: "told"}, null, ...sentences(v, c, dapo).filter(([at]) => !stage || at <= stage).map(
    ([, text]) => el("li", {}, text)));
  const table = el("div", {class: "wide"}, null, el("table", {class: "panel"}, null, head, ...body));
  return el("div", {class: "one"}, null, title, told, ...picture, table);
}
