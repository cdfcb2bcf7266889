"use strict";
// The token panel: HAPO's formulas with one token's numbers. Each line: [name, formula, with
// numbers, value]. A formula is a text in which _{} and ^{} mark indices; what a run's file does
// not hold is said to be missing.

const FLOOR = 1e-8, LIMIT = 20;

/** Sums over a group's responses of f(response), each counted `weight(response)` times. */
const sum = (answers, f, weight = () => 1) => answers.reduce((s, a) => s + f(a) * weight(a), 0);

/** B, Eq. 9: mean and deviation of the rewards over a group's tokens. */
function tokenAverage(answers) {
  const n = sum(answers, a => a.tokens.length), R = a => a.reward, size = a => a.tokens.length;
  const mean = sum(answers, R, size) / n;
  return {n, mean, deviation: Math.sqrt(sum(answers, a => (R(a) - mean) ** 2, size) / n)};
}

/** GRPO: mean and sample deviation of the rewards over a group's responses. */
function responseAverage(answers) {
  const n = answers.length, mean = sum(answers, a => a.reward) / n;
  return {n, mean, deviation: Math.sqrt(sum(answers, a => (a.reward - mean) ** 2) / (n - 1))};
}

/** An advantage; 0 where all rewards of the group are equal. */
function advantageOf(reward, average, answers) {
  const rewards = answers.map(a => a.reward);
  if (Math.max(...rewards) === Math.min(...rewards)) return 0;
  return (reward - average.mean) / (average.deviation + 1e-6);
}

/** Eq. 6: h from x = log H and the statistics of the batch. */
function modulation(x, stats, released) {
  const d = x - stats.pivot, below = released ? stats.h_min : Math.abs(stats.h_min);
  return Math.max(-1, Math.min(1, d > 0 ? d / stats.h_max : d / below));
}

/** Whether a ratio has left the neutral zone [1 - low / 2, 1 + high / 2] of C. */
function hasMoved(ratio, low, high, released) {
  const inside = released ? ratio > 1 - low / 2 && ratio < 1 + high / 2
                          : ratio >= 1 - low / 2 && ratio <= 1 + high / 2;
  return !inside;
}

/** All that HAPO makes of one token, {name: value}. null: the file does not hold it. */
function compute(answer, i, group, run) {
  const s = run.settings || {}, at = name => (answer[name] ? answer[name][i] : null), v = {};
  v.H = at("entropy");
  v.x = v.H === null ? null : Math.log(Math.max(v.H, FLOOR));
  v.stats = group.stats && group.stats.pivot !== null && group.stats.pivot !== undefined
    && group.stats.h_max ? group.stats : null;
  v.h = v.x === null || !v.stats ? at("h") : modulation(v.x, v.stats, s.released);
  v.T = at("temperature");
  v.R = answer.reward;
  v.tokens = tokenAverage(group.answers);
  v.responses = responseAverage(group.answers);
  v.A_B = advantageOf(v.R, v.tokens, group.answers);
  v.A_GRPO = advantageOf(v.R, v.responses, group.answers);
  const byToken = s.algo === "hapo" && s.token_group_average;
  v.A = byToken ? v.A_B : v.A_GRPO;
  v.old = at("old_logp");
  v.new = at("new_logp");
  v.ratio = v.old === null || v.new === null ? at("ratio")
    : Math.exp(Math.max(-LIMIT, Math.min(LIMIT, v.new - v.old)));
  const base = [s.clip_low, s.clip_high], hapo = s.algo === "hapo";
  const sure = Math.min(v.h, 0), uncertain = Math.max(v.h, 0);
  const adapted = [base[0] * (1 - sure), base[1] * (1 + uncertain)];
  [v.low, v.high] = hapo && s.adaptive_clip && v.h !== null ? adapted : base;
  v.zone = s.released && s.adaptive_clip ? adapted : base;
  v.moved = v.ratio === null ? null : hasMoved(v.ratio, ...v.zone, s.released);
  const scaled = hapo && s.advantage_redistribution && v.h !== null && (v.h > 0) === v.moved;
  v.A_C = scaled ? v.A * (1 + v.h) : v.A;
  v.scaled = scaled;
  const recorded = at("advantage");  // by a baseline's rule, a length penalty, ...: not by these formulas
  v.other = recorded !== null && Math.abs(recorded - v.A_C) > 1e-3 * Math.max(1, Math.abs(recorded));
  if (v.other) [v.A_C, v.scaled] = [recorded, false];
  if (v.ratio !== null) {
    v.bounded = Math.max(1 - v.low, Math.min(1 + v.high, v.ratio));
    v.unclipped = v.ratio * v.A_C;
    v.clipped = v.bounded * v.A_C;
    v.objective = Math.min(v.unclipped, v.clipped);
    v.learns = v.A_C !== 0 && !(v.clipped < v.unclipped);
  }
  return v;
}

/** A number's text with a real minus sign. */
const signed = text => text.replace(/^-/, "\u2212");

/** The lines of the panel. */
function lines(v, run) {
  const s = run.settings || {}, t = v.tokens, g = v.responses;
  const n = x => (x < 0 ? `(${signed(number(x))})` : number(x));  // a factor or a term
  const none = "missing in this run's file", has = x => x !== null && x !== undefined;
  const line = (name, formula, numbers, value) =>
    [name, formula, has(value) ? numbers : none, has(value) ? value : null];
  const P = v.stats || {}, above = v.x !== null && v.stats && v.x > P.pivot;
  const edge = above ? "h_{max}" : "|h_{min}|", scale = above ? P.h_max : Math.abs(P.h_min);
  const rows = [
    line("entropy", "H = \u2212\u03a3 p log p", "of the policy that drew it, in nats", v.H),
    line("log entropy", "x = log H", `log ${n(v.H)}`, v.x),
    line("pivot", "x_{\u03c1}", "the \u03c1-quantile of x over the batch", P.pivot),
    line("h (Eq. 6)", `(x \u2212 x_{\u03c1}) / ${edge}`, `(${n(v.x)} \u2212 ${n(P.pivot)}) / ${n(scale)}`,
      v.stats ? v.h : null),
    line("temperature (A)", !(s.algo === "hapo" && s.adaptive_temperature) ? "T_{base}"
      : s.temperature_form === "zscore" ? "T_{base} (1 + \u03c4 z)" : "T_{base} (1 + \u03c4 h)",
      `T_base ${n(run.base)}, \u03c4 ${n(run.tau)}, with the statistics of the previous batch`, v.T),
    line("reward", "R", "of the response", v.R),
    line("mean over tokens (B)", "\u03bc = \u03a3 R_{i} n_{i} / \u03a3 n_{i}", `over ${t.n} tokens of the group`, t.mean),
    line("deviation over tokens (B)", "s", `over ${t.n} tokens of the group`, t.deviation),
    line("A by B (Eq. 9)", "(R \u2212 \u03bc) / (s + 10^{\u22126})", `(${n(v.R)} \u2212 ${n(t.mean)}) / ${n(t.deviation)}`, v.A_B),
    line("mean over responses", "mean R", `over ${g.n} responses`, g.mean),
    line("deviation over responses", "std R", `over ${g.n} responses`, g.deviation),
    line("A by GRPO", "(R \u2212 mean) / (std + 10^{\u22126})", `(${n(v.R)} \u2212 ${n(g.mean)}) / ${n(g.deviation)}`, v.A_GRPO),
    line("old log-probability", "log p_{old}", "before the step's updates", v.old),
    line("new log-probability", "log p_{new}", "after them", v.new),
    line("ratio", "r = exp(log p_{new} \u2212 log p_{old})", `exp(${n(v.new)} \u2212 ${n(v.old)})`, v.ratio),
    line("neutral zone (C)", "[1 \u2212 \u03b5_{low}/2, 1 + \u03b5_{high}/2]",
      `[${n(1 - v.zone[0] / 2)}, ${n(1 + v.zone[1] / 2)}]`, has(v.moved) ? (v.moved ? "moved" : "inside") : null),
    line("A after C (Eq. 10-11)", v.scaled ? "A (1 + h)" : "A", v.other ? "as recorded: this run has another rule"
      : v.scaled ? `${n(v.A)} (1 + ${n(v.h)})` : n(v.A), v.A_C),
    line("lower bound (D)", "1 \u2212 \u03b5_{low} (1 \u2212 min(h, 0))", `1 \u2212 ${n(s.clip_low)} (1 \u2212 ${n(Math.min(v.h, 0))})`, 1 - v.low),
    line("upper bound (D)", "1 + \u03b5_{high} (1 + max(h, 0))", `1 + ${n(s.clip_high)} (1 + ${n(Math.max(v.h, 0))})`, 1 + v.high),
    line("unclipped", "r A", `${n(v.ratio)} \u00b7 ${n(v.A_C)}`, v.unclipped),
    line("clipped", "clip(r) A", `${n(v.bounded)} \u00b7 ${n(v.A_C)}`, v.clipped),
    line("objective", "min(r A, clip(r) A)", `min(${n(v.unclipped)}, ${n(v.clipped)})`, v.objective),
    line("gradient", "\u2202 objective / \u2202 log p", "none where the clipped branch is the smaller one, or A is 0",
      has(v.learns) ? (v.learns ? "learns" : "stopped") : null),
  ];
  return rows;
}

/** A formula's text as MathML: names, _{index} and ^{exponent}. */
function formula(text) {
  const NSM = "http://www.w3.org/1998/Math/MathML";
  const node = (name, ...children) => {
    const e = document.createElementNS(NSM, name);
    e.append(...children);
    return e;
  };
  const row = node("mrow"), letter = /[A-Za-z\u0370-\u03ff\u2202}]/;
  const parts = text.match(/[A-Za-z\u0370-\u03ff|]+(?:_\{[^}]*\})?|\d+(?:\^\{[^}]*\})?|\s+|./g) || [];
  for (const [at, part] of parts.entries()) {
    if (!part.trim() && letter.test((parts[at - 1] || "").slice(-1)) && letter.test(parts[at + 1] || "")) {
      const space = node("mspace");  // between two names
      space.setAttribute("width", "0.25em");
      row.append(space);
    }
    const index = part.match(/^(.+?)([_^])\{(.*)\}$/);
    if (index) row.append(node(index[2] === "_" ? "msub" : "msup", node("mi", index[1]), node("mi", index[3])));
    else if (part.trim()) row.append(node(/^[A-Za-z\u0370-\u03ff|]+$/.test(part) ? "mi" : /^\d/.test(part) ? "mn" : "mo", part));
  }
  const math = node("math", row);
  math.setAttribute("aria-label", text.replace(/[_^]\{([^}]*)\}/g, " $1"));
  return math;
}

/** The panel of one token, a table; its neighbours stand in the title. */
function tokenPanel(answer, i, group, run) {
  const near = answer.tokens.slice(Math.max(0, i - 4), i + 5).map(visible);
  const caption = el("caption", {}, null, near.slice(0, Math.min(i, 4)).join(""),
    el("b", {}, ` ${visible(answer.tokens[i]) || "\u2205"} `), near.slice(Math.min(i, 4) + 1).join(""),
    el("span", {class: "quiet"}, `  ${visible(run.name)}, step ${group.step}`
      + (group.stats && group.stats.layer ? `, policy of layer ${group.stats.layer}` : "")));
  const rows = lines(compute(answer, i, group, run), run).map(([name, text, numbers, value]) =>
    el("tr", {}, null, el("th", {scope: "row"}, name), el("td", {}, null, formula(text)),
      el("td", {}, numbers), el("td", {class: "value"}, value === null ? "\u2013" : signed(number(value, 6)))));
  const head = el("tr", {}, null, ...["quantity", "formula", "with this token's numbers", "value"].map(
    name => el("th", {scope: "col"}, name)));
  return el("table", {class: "panel"}, null, caption, head, ...rows);
}
