// The browser of completions: two panes to compare, a search.

function tokenSpan(text, index, logp) {
  const p = logp === null || logp === undefined ? 1 : Math.exp(logp / 100);
  const level = [0.9, 0.5, 0.1, 0.01].filter((bound) => p < bound).length;
  const span = make("span", { class: `t p${level}`, "data-i": index });
  span.append(visible(/^\s*\n\s*$/.test(text) ? text.replaceAll("\n", "↵\n") : text));
  return span;
}

/** Indices of the tokens that hold a part of any occurrence of `query` (lower case) in their joined text. */
function tokensWith(tokens, query) {
  const found = new Set();
  if (!query) return found;
  const ends = [];
  let text = "";
  for (const token of tokens) {
    text += token.toLowerCase();
    ends.push(text.length);
  }
  for (let from = text.indexOf(query), i = 0; from >= 0; from = text.indexOf(query, from + query.length)) {
    while (ends[i] <= from) i++;
    for (let j = i; j < ends.length && (j ? ends[j - 1] : 0) < from + query.length; j++) found.add(j);
  }
  return found;
}

function browseCompletions({ prompts, rollouts, completions }) {
  const stages = new Set(rollouts.map((rollout) => rollout.stage)).size > 1;
  const stepName = (at) => (stages ? `${rollouts[at].stage}, ` : "") + `step ${rollouts[at].step}`;
  const groups = new Map(); // "at:prompt" -> the group's completions by member
  const promptsAt = rollouts.map(() => []);
  const rolloutsOf = prompts.map(() => []);
  for (const completion of completions) {
    const key = `${completion.at}:${completion.prompt}`;
    if (!groups.has(key)) {
      groups.set(key, []);
      promptsAt[completion.at].push(completion.prompt);
      rolloutsOf[completion.prompt].push(completion.at);
    }
    groups.get(key).push(completion);
  }
  rolloutsOf.forEach((list) => list.sort((a, b) => a - b));
  const present = rollouts.map((_, at) => at).filter((at) => promptsAt[at].length);

  const search = document.getElementById("search");
  const tip = document.getElementById("tip");
  const query = () => search.value.trim().toLowerCase();

  function showTip(span, { tokens, logp, cut }) {
    const i = Number(span.dataset.i);
    const place = cut && i >= cut.at ? i + cut.tokens : i;
    const value = logp[i];
    const known = value !== null && value !== undefined;
    tip.textContent = `“${visible(tokens[i])}”, token ${place + 1}` +
      (known ? `\nlog-probability ${signed(value / 100)}, probability ${percent(Math.exp(value / 100))}` : "\nno log-probability");
    tip.hidden = false;
    const box = span.getBoundingClientRect();
    const left = Math.min(Math.max(box.left, 8), innerWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    Object.assign(tip.style, { left: `${left}px`, top: `${above > 0 ? above : box.bottom + 6}px` });
  }

  function makePane(name, start) {
    const state = { ...start, member: 0 };
    const button = (label, text, move) => make("button", { type: "button", "aria-label": label, onclick: move }, text);
    const steps = make("select", { "aria-label": `Step, pane ${name}`, onchange: () => go(Number(steps.value), state.prompt) });
    const prompt = make("select", { "aria-label": `Prompt, pane ${name}`, class: "wide", onchange: () => go(state.at, Number(prompt.value)) });
    const earlier = button("Earlier step", "←", () => walk(-1));
    const later = button("Later step", "→", () => walk(1));
    const members = make("div", { class: "members", role: "group", "aria-label": "Members of the group" });
    const facts = make("dl", { class: "facts" });
    const question = make("pre");
    const text = make("pre", { class: "completion", dir: "auto" });
    const element = make("article", { class: "pane", tabindex: "0", "aria-label": `Completion, pane ${name}` },
      make("div", { class: "choose" }, earlier, steps, later, prompt), members, facts,
      make("details", {}, make("summary", {}, "Whole prompt"), question), text);
    let here = -1;

    const group = () => groups.get(`${state.at}:${state.prompt}`);
    /** The steps the arrows go through: the same prompt's if there are more of them, else all. */
    const path = () => (rolloutsOf[state.prompt].length > 1 ? rolloutsOf[state.prompt] : present);

    function walk(by) {
      const next = path()[path().indexOf(state.at) + by];
      if (next !== undefined) go(next, state.prompt);
    }

    function go(at, wanted, member = 0) {
      const kept = groups.has(`${at}:${wanted}`) ? wanted : promptsAt[at][0];
      Object.assign(state, { at, prompt: kept, member });
      show();
    }

    function pick(member) {
      state.member = Math.min(Math.max(member, 0), group().length - 1);
      show();
    }

    function fillChoices() {
      const option = (at) => make("option", { value: at, selected: at === state.at }, stepName(at));
      const same = rolloutsOf[state.prompt];
      const others = present.filter((at) => !same.includes(at));
      steps.replaceChildren(make("optgroup", { label: "This prompt" }, ...same.map(option)));
      if (others.length) steps.append(make("optgroup", { label: "Other prompts" }, ...others.map(option)));
      prompt.replaceChildren(...promptsAt[state.at].map((i) => make("option", { value: i, selected: i === state.prompt },
        visible(prompts[i].label) + (prompts[i].level === null ? "" : ` · level ${prompts[i].level}`))));
      earlier.disabled = path().indexOf(state.at) <= 0;
      later.disabled = path().indexOf(state.at) === path().length - 1;
    }

    function fillMembers() {
      const focused = members.contains(document.activeElement);
      members.replaceChildren(...group().map((one, i) => {
        const side = one.advantage > 0 ? "above" : one.advantage < 0 ? "below" : "level";
        const reward = one.reward === null ? "?" : shortened(one.reward);
        return make("button", { type: "button", class: side, "aria-pressed": String(i === state.member), onclick: () => pick(i),
          "aria-label": `Member ${one.member}, reward ${reward}, ${side} the group's mean`, title: `member ${one.member}` }, reward);
      }));
      if (focused) members.children[state.member].focus();
    }

    function fillFacts(one) {
      const parts = Object.entries(one.rewards).map(([part, value]) => `${part} ${value === null ? "?" : shortened(value)}`);
      const known = one.logp.filter((value) => value !== null);
      const rows = [
        ["reward", (one.reward === null ? "?" : shortened(one.reward)) + (parts.length ? ` (${parts.join(", ")})` : "")],
        ["advantage", one.advantage === null ? "?" : signed(one.advantage)],
        ["answer", one.answer ?? "none"],
        ["gold", prompts[one.prompt].gold],
        ["tokens", String(one.length)],
        ["stop", { stop: "by itself", length: "cut off at the limit" }[one.stop] ?? one.stop],
        ["mean log-probability", known.length ? signed(known.reduce((a, b) => a + b) / known.length / 100) : null],
        ...one.flags.map((flag) => ["flag", flag]),
      ];
      facts.replaceChildren(...rows.filter(([, value]) => value !== null && value !== undefined).map(([term, value]) =>
        make("div", {}, make("dt", {}, term), make("dd", { class: term === "flag" ? "flag" : null }, visible(value)))));
    }

    function show() {
      const one = group()[state.member];
      fillChoices();
      fillMembers();
      fillFacts(one);
      question.textContent = visible(prompts[state.prompt].text);
      const found = tokensWith(one.tokens, query());
      const spans = one.tokens.map((token, i) => tokenSpan(token, i, one.logp[i]));
      found.forEach((i) => spans[i].classList.add("hit"));
      text.replaceChildren(...(spans.length ? spans : ["(empty)"]));
      if (one.cut) spans[one.cut.at].before(make("span", { class: "left-out" }, `${one.cut.tokens.toLocaleString("en")} tokens left out`));
      here = -1;
      tip.hidden = true;
    }

    function walkTokens(by) {
      const spans = text.querySelectorAll(".t");
      if (!spans.length) return;
      spans[here]?.classList.remove("here");
      here = Math.min(Math.max(here + by, 0), spans.length - 1);
      spans[here].classList.add("here");
      spans[here].scrollIntoView({ block: "nearest" });
      showTip(spans[here], group()[state.member]);
    }

    const pointed = (event) => {
      const span = event.target.closest(".t");
      if (span) showTip(span, group()[state.member]);
    };
    text.addEventListener("pointerover", pointed);
    text.addEventListener("click", pointed);
    text.addEventListener("pointerleave", () => (tip.hidden = true));
    text.addEventListener("scroll", () => (tip.hidden = true));
    element.addEventListener("blur", () => (tip.hidden = true));
    element.addEventListener("keydown", (event) => {
      if (event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
      const list = promptsAt[state.at];
      const turn = (by) => go(state.at, list[(list.indexOf(state.prompt) + by + list.length) % list.length]);
      const moves = {
        ArrowLeft: () => (event.shiftKey ? walkTokens(-1) : walk(-1)), ArrowRight: () => (event.shiftKey ? walkTokens(1) : walk(1)),
        ArrowUp: () => pick(state.member - 1), ArrowDown: () => pick(state.member + 1), "[": () => turn(-1), "]": () => turn(1),
      };
      if (!moves[event.key]) return;
      event.preventDefault();
      moves[event.key]();
    });
    show();
    return { element, go, show };
  }

  // Open where most can be seen: the prompt that spans most steps, at its first and its last.
  const span = (i) => rolloutsOf[i].at(-1) - rolloutsOf[i][0];
  const widest = prompts.map((_, i) => i).reduce((best, i) => (span(i) > span(best) ? i : best), 0);
  const ends = span(widest) ? [rolloutsOf[widest][0], rolloutsOf[widest].at(-1)] : [present[0], present.at(-1)];
  const panes = ends.map((at, i) => makePane(i + 1, { at, prompt: groups.has(`${at}:${widest}`) ? widest : promptsAt[at][0] }));
  document.querySelector(".panes").append(...panes.map((pane) => pane.element));
  let active = panes[1];
  const activate = (pane) => {
    active = pane;
    panes.forEach((one) => one.element.classList.toggle("active", one === pane));
  };
  panes.forEach((pane) => pane.element.addEventListener("focusin", () => activate(pane)));
  activate(active);

  const texts = completions.map((one) => [one.tokens.join(""), prompts[one.prompt].label, one.answer ?? "", ...one.flags].join("\n"));
  const lower = texts.map((text) => text.toLowerCase());

  function find() {
    const wanted = query();
    const hits = wanted ? completions.map((_, i) => i).filter((i) => lower[i].includes(wanted)) : [];
    hits.sort((a, b) => completions[a].at - completions[b].at);
    const listed = hits.filter((_, i) => i % Math.ceil(hits.length / 100) === 0);
    const among = (at) => {
      const own = completions.filter((one) => one.at === at).length;
      return `${percent(hits.filter((i) => completions[i].at === at).length / own)} at ${stepName(at)}`;
    };
    document.getElementById("found").value = !wanted ? ""
      : `in ${hits.length.toLocaleString("en")} of ${completions.length.toLocaleString("en")} completions` +
        (hits.length && present.length > 1 ? `: ${among(present[0])}, ${among(present.at(-1))}` : "") +
        (listed.length < hits.length ? `; ${listed.length} of them are listed` : "");
    document.getElementById("hits").replaceChildren(...listed.map((i) => {
      const one = completions[i];
      const from = lower[i].indexOf(wanted), to = from + wanted.length;
      const open = () => {
        active.go(one.at, one.prompt, groups.get(`${one.at}:${one.prompt}`).indexOf(one));
        active.element.focus();
        active.element.scrollIntoView({ block: "nearest" });
      };
      return make("li", {}, make("button", { type: "button", onclick: open },
        make("small", {}, `${stepName(one.at)}, member ${one.member}, reward ${one.reward ?? "?"} `),
        visible(texts[i].slice(Math.max(from - 50, 0), from)), make("mark", {}, visible(texts[i].slice(from, to))),
        visible(texts[i].slice(to, to + 70))));
    }));
    panes.forEach((pane) => pane.show());
  }
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 150);
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") document.querySelector("#hits button")?.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip.hidden = true;
    if (/INPUT|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const target = { "/": search, 1: panes[0].element, 2: panes[1].element }[event.key];
    if (!target) return;
    event.preventDefault();
    target.focus();
    target.scrollIntoView({ block: "nearest" });
  });
}

const records = read("records");
if (records.completions.length) {
  document.getElementById("browser").hidden = false;
  browseCompletions(records);
}
