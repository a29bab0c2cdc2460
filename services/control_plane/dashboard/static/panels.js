// What is drawn, in which section, and what to look for (docs/seeing.md says more).

const one = (name, label = "") => (store) => several(store, [[name, label]]);

function several(store, names) {
  const { x, columns } = store.steps;
  return { x, series: names.filter(([name]) => name in columns).map(([name, label]) => ({ label, y: columns[name] })) };
}

// Those that there are at least so many of, and that are not nothing throughout.
const some = (least, data) => (store) => {
  const { x, series } = data(store);
  const there = series.filter(({ y }) => y.some(Boolean));
  return { x, series: there.length >= least ? there : [] };
};

const prefixed = (prefix, say = (name) => name) => (store) =>
  several(store, store.steps.named(prefix).map((name) => [name, say(name.slice(prefix.length))]));

function age(group) {
  const [first, last] = group.replace("age_", "").split("_");
  return `age ${first}${last === "on" ? " and older" : last ? ` to ${last}` : ""}`;
}

function ages(store) {
  const names = store.steps.named("log_ratio_std/age_");
  names.sort((one, other) => Number(one.split("_")[3]) - Number(other.split("_")[3]));
  if (!names.length) return several(store, [["log_ratio_std", "all ages"]]);
  return several(store, names.map((name) => [name, age(name.slice("log_ratio_std/".length))]));
}

// Evaluations of a branch that the run has left are ahead of its last step.
function evaluations(store) {
  const { x, columns } = store.evaluations;
  const steps = store.steps.x, last = steps.length ? steps[steps.length - 1] : 0;
  const count = x.filter((step) => step <= last).length;
  const cut = (name) => columns[name].slice(0, count);
  if (!count) return { x: [], series: [] };
  const tasks = Object.keys(columns).filter((name) => name.startsWith("task/"));
  return {
    x: x.slice(0, count),
    series: [
      { label: tasks.length ? "all" : "", y: cut("pass_at_1"), low: cut("low"), high: cut("high"), points: true },
      ...tasks.map((name) => ({ label: name.slice(5), y: cut(name), points: true })),
    ],
  };
}

// The gate's mean and the middle 80 % of the tokens, by the advantage's sign; of an objective without one, the
// coefficient's.
function weights(store) {
  const { x, columns } = store.steps;
  const name = store.steps.named("gate/").length ? "gate" : "coefficient";
  const series = [];
  for (const [sign, label, colour] of [["positive", "A > 0", 0], ["negative", "A < 0", 1]]) {
    if (!(`${name}/${sign}` in columns)) continue;
    const [low, high] = [columns[`${name}_p10/${sign}`], columns[`${name}_p90/${sign}`]];
    const mean = { label: `${name === "gate" ? "" : "coefficient, "}${label}`, y: columns[`${name}/${sign}`], colour };
    series.push(low && high ? { ...mean, low, high } : mean);
  }
  return { x, series };
}

const signs = (name) => (store) => several(store, [[`${name}/positive`, "A > 0"], [`${name}/negative`, "A < 0"]]);
const share = (_, low, high) => [Math.min(0, low ?? 0), Math.max(1, high ?? 1)];

// Histograms of the newest step that has some, over bins of the log-ratio: bin i lies between edges i - 1 and i.
function bins(store, series) {
  const found = store.histograms;
  return found ? { x: found.edges.concat(0).map((_, index) => index), series: series(found) } : { x: [], series: [] };
}

function shares(groups, label) {
  return (store) => bins(store, ({ tokens }) => Object.keys(tokens).filter(groups).map((group) => {
    const sum = tokens[group].reduce((one, other) => one + other, 0);
    return { label: label(group), y: tokens[group].map((count) => count / sum) };
  }));
}

const SIGNS = { positive: "A > 0", negative: "A < 0" };

function weightByRatio(store) {
  return bins(store, ({ weight, weight_name: name }) => Object.entries(weight).map(([sign, y]) => (
    { label: `${name === "gate" ? "" : "coefficient, "}${SIGNS[sign]}`, y, points: true, colour: sign === "positive" ? 0 : 1 })));
}

function binName(store, index) {
  const edges = store.histograms?.edges ?? [];
  if (index <= 0) return `below ${edges[0]}`;
  return index >= edges.length ? `above ${edges[edges.length - 1]}` : `${edges[index - 1]} to ${edges[index]}`;
}

export const PANELS = [
  { section: "learning", name: "reward", title: "Reward while training", unit: "mean per response", data: one("reward"),
    say: "What the responses of each step were worth. Noisy: a step has few prompts." },
  { section: "learning", name: "pass_at_1", title: "Held-out pass@1", unit: "share correct, 95 % interval", range: share,
    data: evaluations, say: "The same question to all held-out prompts. Believe this one." },
  { section: "learning", name: "length", title: "Response length", unit: "tokens, mean", data: one("response_tokens"),
    say: "A reward that rises only because responses become longer, or shorter." },
  { section: "learning", name: "entropy", title: "Entropy of the policy", unit: "nats per token", data: one("entropy"),
    say: "Falls while the policy becomes sure. Near 0 early: all responses are alike, nothing is left to learn from." },
  { section: "learning", name: "finished", title: "Responses that end by themselves", unit: "share", range: share,
    data: one("stopped"), say: "It falls: the token limit cuts responses off; raise sampling.max_tokens." },
  { section: "learning", name: "rewards", title: "Reward components", unit: "mean per response", data: some(2, prefixed("reward/")), optional: true,
    say: "What the reward is made of: one component may rise at another's expense." },
  { section: "health", name: "log_ratio", title: "Spread of the log-ratio, by age", unit: "standard deviation, nats", data: ages,
    say: "Age 0 near 0: what is there is the engine. Age 1 wide: one step moves the policy far, lower the learning rate." },
  { section: "health", name: "policy_age", title: "Policy age of trained tokens", unit: "optimizer steps",
    data: (store) => several(store, [["policy_age_mean", "mean"], ["policy_age_max", "oldest token"]]),
    say: "How old trained tokens are; pacing.lookahead sets it." },
  { section: "health", name: "outcomes", title: "What became of the groups", unit: "groups per step", data: some(1, prefixed("outcome/")),
    say: "degenerate rises as prompts become easy, or never solved. refused, invalid, stale should stay at 0." },
  { section: "health", name: "gradient_norm", title: "Gradient norm", unit: "before clipping", data: one("gradient_norm"),
    say: "Single peaks are clipped. A level that rises for long: the learning rate is too high." },
  { section: "speed", name: "tokens", title: "Tokens trained", unit: "tokens per second", data: one("tokens_per_second"),
    say: "Per second of the whole run; groups without signal count for none." },
  { section: "speed", name: "waiting", title: "Who waits", unit: "share of time", range: share,
    data: (store) => several(store, [["waiting", "learner, for groups"], ["idle", "engines stand still"]]),
    say: "Both low is a balanced run." },
  { section: "speed", name: "step_time", title: "Time of a step", unit: "seconds",
    data: (store) => several(store, [["seconds", "whole step"], ["waited", "waiting for groups"]]),
    say: "What is between the two lines is the learner's own work." },
  { section: "speed", name: "phases", title: "Where the learner's time goes", unit: "seconds per step", data: phases,
    say: "The most expensive phases of a step, the largest first." },
  { section: "objective", name: "weights", title: "Weight of tokens", unit: "mean, 10 to 90 %", data: weights,
    say: "1 is the plain policy gradient. Low: tokens whose ratio is far from 1 count for little." },
  { section: "objective", name: "sample_size", title: "Effective sample size", unit: "share of tokens", range: share,
    data: signs("effective_sample_size"), say: "The share of tokens that would, all weighted alike, tell as much. Low: a few decide." },
  { section: "objective", name: "weight_by_ratio", title: "Weight against log-ratio", unit: "mean in each bin", data: weightByRatio,
    optional: true, x: "log-ratio", bins: binName, say: "As measured on the newest step's tokens: how fast the gate closes on either side." },
  { section: "objective", name: "ratio_by_sign", title: "Log-ratio, by sign of the advantage", unit: "share of tokens", optional: true,
    data: shares((group) => group in SIGNS, (group) => SIGNS[group]), x: "log-ratio", bins: binName,
    say: "Of the newest step. Both signs alike and narrow: the data are young." },
  { section: "objective", name: "ratio_by_age", title: "Log-ratio, by policy age", unit: "share of tokens", optional: true,
    data: shares((group) => group.startsWith("age_"), age), x: "log-ratio", bins: binName,
    say: "Of the newest step. It widens with age; age 0 is the engine's own noise." },
  { section: "objective", name: "kl", optional: true, title: "KL of behaviour to current policy", unit: "nats per token", data: signs("kl"),
    say: "How far the policy has moved from the one that sampled." },
];

// In threads of their own: they take no time from a step.
const BESIDE = ["phase/archive", "phase/publish"];

function phases(store) {
  const found = store.steps.named("phase/").map((name) => ({ name, size: store.steps.last(name) ?? 0 }));
  found.sort((one, other) => other.size - one.size);
  return several(store, found.slice(0, 5).map(({ name }) => [name, BESIDE.includes(name) ? `${name.slice(6)} (beside)` : name.slice(6)]));
}
