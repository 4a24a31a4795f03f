"use strict";
// Everything on the page is there without this script; it adds values under the pointer, filters and tabs.
document.documentElement.classList.add("js");

const tip = document.getElementById("tip");
const SVG = "http://www.w3.org/2000/svg";

function nearest(points, x) {
  let best = points[0];
  for (const point of points) if (Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
  return best;
}

function line(text, tag) {
  const element = document.createElement(tag || "span");
  element.textContent = text;
  tip.append(element);
}

for (const plot of document.querySelectorAll("svg.plot")) {
  const series = JSON.parse(plot.dataset.hover);
  const named = JSON.parse(plot.dataset.places || "null");
  const spans = JSON.parse(plot.dataset.spans || "[]");
  const [, top, , bottom] = plot.dataset.frame.split(",").map(Number);
  const cross = plot.querySelector(".cross");
  const places = [...new Set(series.flatMap((one) => one.p.map((point) => point[0])))].sort((a, b) => a - b);
  const pins = [];
  let place = -1;

  function show(index) {
    place = Math.max(0, Math.min(places.length - 1, index));
    const x = places[place];
    const found = series.map((one) => nearest(one.p, x));
    const step = found.find((point) => point[0] === x)[2];
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.setAttribute("y1", top);
    cross.setAttribute("y2", bottom);
    cross.removeAttribute("hidden");
    pins.splice(0).forEach((pin) => pin.remove());
    tip.replaceChildren();
    line(named ? named[step - 1] : "step " + step.toLocaleString("en"), "b");
    series.forEach((one, k) => {
      const [px, py, at, text] = found[k];
      line((series.length > 1 ? one.n + ": " : "") + text + (at === step ? "" : " at " + (named ? named[at - 1] : "step " + at.toLocaleString("en"))));
      if (py === null) return; // a band has two ends
      const pin = document.createElementNS(SVG, "circle");
      pin.setAttribute("class", "pin c" + one.c);
      pin.setAttribute("cx", px);
      pin.setAttribute("cy", py);
      pin.setAttribute("r", 4.5);
      plot.append(pin);
      pins.push(pin);
    });
    for (const [from, to, name] of spans) if (x >= from && x <= to) line(name, "em");
    tip.hidden = false;
    const box = plot.getBoundingClientRect();
    const scale = box.width / plot.viewBox.baseVal.width;
    const left = box.left + x * scale;
    const beside = left + 14 + tip.offsetWidth < window.innerWidth - 8;
    tip.style.left = Math.max(8, beside ? left + 14 : left - 14 - tip.offsetWidth) + "px";
    tip.style.top = Math.max(8, box.top + top * scale) + "px";
  }

  function hide() {
    place = -1;
    tip.hidden = true;
    cross.setAttribute("hidden", "");
    pins.splice(0).forEach((pin) => pin.remove());
  }

  function at(event) {
    const box = plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
    show(places.indexOf(nearest(places.map((one) => [one]), x)[0]));
  }

  plot.addEventListener("pointermove", at);
  plot.addEventListener("pointerdown", at);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) {
      event.preventDefault();
      show(place < 0 ? (by > 0 ? 0 : places.length - 1) : place + by);
    } else if (event.key === "Escape") hide();
  });
}

// Arrow keys walk through a row or column of buttons.
function walk(container, buttons, forward, back) {
  container.addEventListener("keydown", (event) => {
    const by = { [forward]: 1, [back]: -1 }[event.key];
    const now = buttons().indexOf(document.activeElement);
    const next = by && now >= 0 ? buttons()[now + by] : null;
    if (next) {
      event.preventDefault();
      next.focus();
      next.click();
    }
  });
}

for (const pairs of document.querySelectorAll("[data-pairs]")) {
  const tabs = [...pairs.querySelectorAll("[role=tab]")];
  const select = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  tabs.forEach((tab) => tab.addEventListener("click", () => select(tab)));
  walk(pairs.querySelector(".tabs"), () => tabs, "ArrowRight", "ArrowLeft");
  select(tabs[0]);
}

for (const browser of document.querySelectorAll("[data-browser]")) {
  const form = browser.querySelector(".filters");
  const list = browser.querySelector(".list");
  const buttons = [...list.querySelectorAll("button")];
  const none = browser.querySelector(".nothing");
  const visible = () => buttons.filter((button) => !button.parentElement.hidden);
  let current = null;

  function select(chosen) {
    current = chosen;
    for (const button of buttons) {
      document.getElementById("e-" + button.dataset.key).hidden = button !== chosen;
      if (button === chosen) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    none.hidden = Boolean(chosen);
  }

  function filter() {
    const wanted = [...new FormData(form)].filter(([, value]) => value);
    for (const button of buttons)
      button.parentElement.hidden = wanted.some(([name, value]) => button.dataset[name] !== value);
    const left = visible();
    form.querySelector(".count").textContent = left.length + " of " + buttons.length + " episodes";
    if (!left.includes(current)) select(left[0] || null);
  }

  form.hidden = false;
  list.hidden = false;
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  buttons.forEach((button) =>
    button.addEventListener("click", () => {
      select(button);
      if (browser.getBoundingClientRect().top < 0) {
        const split = browser.querySelector(".shown");
        split.scrollIntoView({ block: "start" });
      }
    }),
  );
  walk(list, visible, "ArrowDown", "ArrowUp");
  filter();
}

// Groups of a step lie in the page as deflated JSON and are unpacked when they are asked for.
async function unpack(step) {
  const packed = document.querySelector('template[data-step="' + step + '"]').content.textContent;
  const bytes = Uint8Array.from(atob(packed.trim()), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function amount(value) {
  if (value === null) return "none";
  return (value > 0 ? "+" : value < 0 ? "\u2212" : "") + Math.abs(value);
}

function block(kind, content, label) {
  const outer = make("div", "block " + kind);
  if (label) outer.append(make("div", "label", label));
  const body = make("div", "body");
  body.append(...content);
  outer.append(body);
  return outer;
}

function calls(turn) {
  return turn.c.flatMap((call) => {
    const line = make("div", "call-line");
    line.append(make("b", "act tool", call.n));
    const body = [line];
    for (const [name, text, long] of call.a) {
      const one = make(long ? "div" : "span", long ? "arg long" : "arg");
      one.append(make("i", "", name), " ", make(long ? "pre" : "code", "", text));
      if (long) body.push(one);
      else line.append(one);
    }
    const called = block("call", body);
    if (call.r === null) return [called, make("p", "unread", "Nothing came back: the episode broke off.")];
    const answer = [make("pre", "", call.r)];
    return [called, call.e ? block("error", answer, "Error: " + call.e) : block("output", answer, "Result")];
  });
}

function broken([text, problem]) {
  const flag = make("span", "flag", "not valid" + (problem ? ": it has " + problem : ""));
  return block("call", [make("pre", "", text), flag]);
}

function mini(episode, number) {
  const words = { solved: "Solved", unsolved: "Not solved", failed: "Broke off", open: "Played" };
  const card = make("article", "card mini" + (episode.kept ? "" : " out"));
  const head = make("header");
  head.append(make("b", "result " + episode.result, number + 1 + ". " + words[episode.result]));
  head.append(make("span", "reward " + (episode.reward > 0 ? "up" : episode.reward < 0 ? "down" : "flat"), amount(episode.reward)));
  card.append(head);
  for (const turn of episode.turns) {
    const one = make("div", "turn");
    if (turn.o !== null) one.append(block("observation", [make("pre", "", turn.o)]));
    if (turn.n) one.append(block("notice", [make("p", "", turn.n)]));
    if (turn.t) one.append(block("thought", [make("p", "", turn.t)]));
    if (turn.c || turn.b) {
      one.append(...(turn.c ? calls(turn) : [broken(turn.b)]));
      if (turn.r) one.append(make("span", "reward " + (turn.r > 0 ? "up" : "down"), amount(turn.r)));
      if (turn.m) one.append(make("p", "made-of", turn.m));
      card.append(one);
      continue;
    }
    const acts = turn.a.map((action, k) => make("span", "act" + (k < turn.x ? "" : " skipped"), action));
    if (!acts.length) acts.push(make("span", "act none", "no action could be read"));
    if (!turn.v) acts.push(make("span", "flag", "not valid"));
    if (turn.r) acts.push(make("span", "reward " + (turn.r > 0 ? "up" : "down"), amount(turn.r)));
    one.append(block("action", acts));
    if (turn.m) one.append(make("p", "made-of", turn.m));
    card.append(one);
  }
  const end = make("p", "why", episode.stop.replaceAll("_", " ") + (episode.kept ? "" : "; the policy did not learn from it") + (episode.error ? ". " + episode.error : ""));
  if (episode.end) card.append(block("end", [make("pre", "", episode.end)]));
  card.append(end);
  return card;
}

function strip(episodes, low, high) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("class", "strip");
  drawing.setAttribute("viewBox", "0 0 160 16");
  const equal = new Map();
  for (const episode of episodes) {
    if (episode.reward === null) continue;
    // Equal rewards stand beside each other, towards the middle, so that they can be counted.
    const before = equal.get(episode.reward) || 0;
    equal.set(episode.reward, before + 1);
    const x = 5 + (high > low ? (150 * (episode.reward - low)) / (high - low) : 75);
    const mark = document.createElementNS(SVG, "circle");
    mark.setAttribute("cx", x + (x > 80 ? -1 : 1) * Math.floor(before / 2) * 7);
    mark.setAttribute("cy", before % 2 ? 11.5 : 4.5);
    mark.setAttribute("r", 3);
    if (!episode.kept) mark.setAttribute("class", "out");
    drawing.append(mark);
  }
  return drawing;
}

for (const browser of document.querySelectorAll("[data-groups]")) {
  const steps = browser.querySelector(".step");
  const which = browser.querySelector(".which");
  const list = browser.querySelector(".group-list");
  const side = browser.querySelector(".side");
  const none = browser.querySelector(".nothing");
  const count = browser.querySelector(".count");
  const unpacked = new Map();
  let asked = "";

  function choose(button, group) {
    for (const other of list.querySelectorAll("button")) other.removeAttribute("aria-current");
    button.setAttribute("aria-current", "true");
    none.hidden = true;
    browser.querySelector(".group-why")?.remove();
    const why = make("p", "group-why", "Group " + (group.n + 1) + (group.why ? ", " + group.why : "") + ". Variance of its rewards: " + (group.var ?? "unknown") + ".");
    side.before(why);
    side.replaceChildren(...group.episodes.map(mini));
  }

  async function load() {
    const step = (asked = steps.value);
    if (!unpacked.has(step)) unpacked.set(step, await unpack(step));
    if (step !== asked) return;
    const groups = unpacked.get(step);
    const rewards = groups.flatMap((group) => group.episodes.map((one) => one.reward)).filter((reward) => reward !== null);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    list.replaceChildren();
    let first = null;
    let shown = 0;
    for (const group of groups) {
      const kept = group.episodes.some((one) => one.kept);
      if (which.value && (which.value === "kept") !== kept) continue;
      shown += 1;
      const item = make("div");
      const button = make("button");
      button.type = "button";
      const middle = make("span");
      middle.append(strip(group.episodes, low, high), make("small", "", group.why || "kept"));
      const solved = group.episodes.filter((one) => one.result === "solved").length;
      button.append(make("span", kept ? "" : "off", String(group.n + 1)), middle, make("span", "num", solved + "/" + group.episodes.length));
      button.addEventListener("click", () => choose(button, group));
      item.append(button);
      list.append(item);
      first ??= [button, group];
    }
    count.textContent = shown + " of " + groups.length + " groups";
    if (first) choose(...first);
    else {
      none.hidden = false;
      browser.querySelector(".group-why")?.remove();
      side.replaceChildren();
    }
  }

  browser.hidden = false;
  steps.addEventListener("change", load);
  which.addEventListener("change", load);
  walk(list, () => [...list.querySelectorAll("button")], "ArrowDown", "ArrowUp");
  load();
}
