"use strict";
// HAPO's formulas for the tokens of a group, from what a run has recorded. The functions are those
// of hapo.py and losses.py under other names; experiments/browser.py compares their numbers. A value
// that the file does not hold, or that only the model could give, is null.

const FLOOR = 1e-8, LIMIT = 20;
const PARTS = {A: "adaptive_temperature", B: "token_group_average", C: "advantage_redistribution", D: "adaptive_clip"};
const DRAWS = ["algo", "adaptive_temperature", "tau", "rho", "released"];  // settings that a draw depends on
const OUTCOMES = ["T", "h", "redistributed", "low", "high", "objective", "loss"];
const has = x => x !== null && x !== undefined;

/** A run's settings. `changes` replaces some; another algorithm brings its own defaults. */
function settingsOf(run, changes = {}) {
  const algo = changes.algo, other = has(algo) && algo !== run.settings.algo;
  const defaults = other ? {clip_high: algo === "grpo" ? 0.2 : 0.28, loss_mean: algo === "grpo" ? "sequence" : "token"} : {};
  const s = {...run.settings, ...defaults, ...changes};
  for (const part in PARTS) s[part] = s.algo === "hapo" && Boolean(s[PARTS[part]]);
  return s;
}

/** Eq. 5 from the 101 recorded quantiles of log H: pivot and largest distances from it. */
function statistics(quantiles, rho) {
  const pivot = quantiles[Math.round(100 * rho)];
  return {pivot, h_max: Math.max(quantiles[100] - pivot, FLOOR), h_min: Math.min(quantiles[0] - pivot, -FLOOR)};
}

/** The statistics of a batch: as recorded, or from its quantiles if rho is another one. */
function statsOf(batch, s, run) {
  if (!batch) return null;
  const recorded = batch.h_max ? {pivot: batch.pivot, h_max: batch.h_max, h_min: batch.h_min, sigma: batch.sigma} : null;
  if (recorded && s.rho === run.settings.rho) return recorded;
  return batch.quantiles ? statistics(batch.quantiles, has(s.rho) ? s.rho : 0.8) : null;
}

/** Eq. 6: h from x = log H and the statistics of a batch. */
function modulation(x, stats, released) {
  const d = x - stats.pivot, below = released ? stats.h_min : Math.abs(stats.h_min);
  return Math.max(-1, Math.min(1, d > 0 ? d / stats.h_max : d / below));
}

/** Eq. 8: the temperature of a token, with the statistics of the previous batch. */
function temperature(x, stats, s) {
  if (!stats) return s.temperature;
  if (s.temperature_form === "two") return s.temperature * (1 + s.tau * Math.sign(x - stats.pivot));
  if (s.temperature_form !== "zscore") return s.temperature * (1 + s.tau * modulation(x, stats, s.released));
  if (!has(stats.sigma)) return null;  // another rho: 101 quantiles do not give sigma
  return s.temperature * Math.max(0.1, Math.min(10, 1 + s.tau * (x - stats.pivot) / stats.sigma));
}

const sum = (items, f) => items.reduce((total, item) => total + f(item), 0);

/** Mean and deviation of the rewards, over tokens (B, Eq. 9) or over responses (GRPO). */
function average(responses, overTokens) {
  const weight = r => (overTokens ? r.tokens.length : 1), n = sum(responses, weight);
  const mean = sum(responses, r => r.reward * weight(r)) / n;
  const squares = sum(responses, r => (r.reward - mean) ** 2 * weight(r));
  return {n, mean, deviation: Math.sqrt(squares / (overTokens ? n : n - 1))};
}

/** The advantages of a group's responses; all 0 where the rewards are equal. */
function advantages(responses, {mean, deviation}) {
  // if outcomes are equal and only a length penalty differs, the run gives no response an advantage
  const rewards = responses.map(r => r.reward), taught = responses.some(r => !r.advantage || r.advantage.some(a => a));
  const differ = taught && Math.max(...rewards) > Math.min(...rewards);
  return rewards.map(reward => (differ ? (reward - mean) / (deviation + 1e-6) : 0));
}

/** What all tokens of a group share: settings, statistics, averages and advantages. */
function contextOf(group, run, changes = {}) {
  const s = settingsOf(run, changes), responses = group.responses;
  const byToken = average(responses, true), byResponse = average(responses, false);
  const grpo = advantages(responses, byResponse);
  let tokens = advantages(responses, byToken);
  if (s.released && tokens.some(a => Math.abs(a) >= 5)) tokens = grpo;  // the release's fallback
  // A's statistics are of the tokens drawn in the step before; the file has them in the usual case
  const known = s.temperature === 1 && !s.dynamic_sampling, before = known ? statsOf(group.before, s, run) : null;
  return {group, run, s, changed: Object.keys(changes).length > 0, byToken, byResponse, tokens, grpo,
    stats: statsOf(group.stats, s, run), before, knowsA: known && (group.step === 1 || Boolean(before))};
}

/** The weight of token i of a response in the loss of its update: 1 / what the mean divides by. */
function lossWeight(response, i, s) {
  if (!response.update_tokens) return null;
  const length = s.loss_mean === "sequence" ? response.tokens.length : s.max_new_tokens;
  const weight = s.loss_mean === "token" ? 1 / response.update_tokens : 1 / (length * response.update_responses);
  if (!s.sampler_correction) return weight;
  return response.sampler_logp ? weight * Math.min(2, Math.exp(response.old_logp[i] - response.sampler_logp[i])) : null;
}

/** All that becomes of token i of response k, {name: value}. was: the same under the run's own settings. */
function compute(k, i, c, was = null) {
  const {s, run} = c, response = c.group.responses[k], v = {k, i, s, other: []};
  const at = name => (response[name] && has(response[name][i]) ? response[name][i] : null);
  // a run's own rule (a baseline, a penalty, ...) may give another value: then the recorded one counts
  const recorded = (name, value, column) => {
    const own = at(column), keep = was && was.other.includes(name) && s.algo === run.settings.algo;
    const differs = !was && has(own) && has(value) && Math.abs(value - own) > 1e-4 * Math.max(1, Math.abs(own));
    if (differs || keep) v.other.push(name);
    return differs || keep || !has(value) && !c.changed ? own : value;
  };
  v.H = at("entropy");
  v.x = has(v.H) ? Math.log(Math.max(v.H, FLOOR)) : null;
  v.before = c.before;
  v.hBefore = has(v.x) && v.before ? modulation(v.x, v.before, s.released) : null;
  v.factor = !has(v.hBefore) ? null : s.temperature_form === "zscore" ? (v.x - v.before.pivot) / v.before.sigma
    : s.temperature_form === "two" ? Math.sign(v.x - v.before.pivot) : v.hBefore;
  v.drawnAt = at("temperature");
  const T = !s.A ? s.temperature : c.knowsA && has(v.x) ? temperature(v.x, v.before, s) : null;
  v.T = has(v.drawnAt) && DRAWS.every(name => s[name] === run.settings[name]) ? v.drawnAt : T;
  v.p = has(at("sampler_logp")) ? Math.exp(at("sampler_logp")) : null;  // at the recorded T
  v.reward = response.reward;
  v.old = at("old_logp");
  v.pBase = !has(c.group.stats.layer) && has(v.old) ? Math.exp(v.old) : null;  // layer l's in phase 1
  v.stats = c.stats;
  v.h = recorded("h", has(v.x) && c.stats ? modulation(v.x, c.stats, s.released) : null, "h");
  v.byToken = c.tokens[k];
  v.byResponse = c.grpo[k];
  v.A = s.B ? v.byToken : v.byResponse;
  v.new = at("new_logp");
  const difference = has(v.old) && has(v.new) ? Math.max(-LIMIT, Math.min(LIMIT, v.new - v.old)) : null;
  v.ratio = recorded("ratio", difference === null ? null : Math.exp(difference), "ratio");
  const base = [s.clip_low, s.clip_high];
  const adapted = [base[0] * (1 - Math.min(v.h, 0)), base[1] * (1 + Math.max(v.h, 0))];
  const unbounded = s.baseline === "cispo" && s.algo === run.settings.algo;
  const bounds = unbounded || s.D && !has(v.h) ? [null, null] : s.D ? adapted : base;
  v.low = recorded("low", bounds[0], "clip_low");
  v.high = recorded("high", bounds[1], "clip_high");
  v.zone = s.released && s.D ? adapted : base;
  if (has(v.ratio)) {
    const low = 1 - v.zone[0] / 2, high = 1 + v.zone[1] / 2, r = v.ratio;
    v.moved = s.released ? !(r > low && r < high) : !(r >= low && r <= high);
  }
  v.scaled = s.C && has(v.h) && has(v.moved) && (v.h > 0) === v.moved;
  v.redistributed = recorded("A", s.C && !(has(v.h) && has(v.moved)) ? null : v.scaled ? v.A * (1 + v.h) : v.A, "advantage");
  if (v.other.includes("A")) v.scaled = false;
  v.weight = lossWeight(response, i, s);
  if (has(v.ratio) && has(v.low) && has(v.redistributed)) surrogate(v, s);
  return v;
}

/** The clipped surrogate of a token, added to v: both branches, the smaller one, the gradient. */
function surrogate(v, s) {
  const A = v.redistributed;
  v.bounded = Math.max(1 - v.low, Math.min(1 + v.high, v.ratio));
  v.unclipped = v.ratio * A;
  v.clipped = v.bounded * A;
  v.objective = Math.min(v.unclipped, v.clipped);
  v.stopped = v.clipped < v.unclipped ? (A > 0 ? 1 : -1) : 0;  // at the upper or the lower bound
  v.dual = Boolean(s.dual_clip) && A < 0 && v.objective < s.dual_clip * A;
  if (v.dual) [v.objective, v.stopped] = [s.dual_clip * A, 1];
  v.learns = A !== 0 && v.stopped === 0;
  v.loss = has(v.weight) ? -v.objective * v.weight : null;
}

/** compute() of every token of a group: [response][token]. was: the same of the run's own settings. */
function computeGroup(c, was = null) {
  return c.group.responses.map((r, k) => r.tokens.map((_, i) => compute(k, i, c, was && was[k][i])));
}

/** Whether a change of settings changes a token. */
const isChanged = (a, b) => OUTCOMES.some(name => a[name] !== b[name]);

/** What a change of settings does to a group: counts over its tokens, and the sum of the advantages. */
function consequences(was, now) {
  const c = {tokens: 0, changed: 0, flips: 0, drawn: 0, stopped: [0, 0], net: [0, 0]};
  was.forEach((row, k) => row.forEach((a, i) => {
    const b = now[k][i];
    c.tokens += 1;
    c.changed += isChanged(a, b);
    c.flips += a.redistributed * b.redistributed < 0;
    c.drawn += a.T !== b.T;
    [a, b].forEach((v, which) => {
      c.stopped[which] += Boolean(v.stopped);
      c.net[which] += v.redistributed || 0;
    });
  }));
  return c;
}
