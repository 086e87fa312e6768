"""Style and script of the explanation's page."""

from __future__ import annotations

STYLE = """
.text { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, "Noto Serif",
    "Liberation Serif", Georgia, serif; font-size: 1.9rem; line-height: 1.9; margin: 1rem 0; }
.token { font: inherit; color: inherit; border: 0; padding: .08em .1em; margin: 0; cursor: pointer;
  border-radius: .25em; border-bottom: 2px solid transparent;
  background: color-mix(in srgb, var(--accent) calc(var(--share, 0) * 55%), transparent); }
.token.frame { font-size: .55em; color: var(--soft); }
.token.mask { border-bottom-color: var(--accent); font-style: italic; }
.token.on { outline: 2px solid var(--accent); }
.hint { color: var(--soft); font-size: .9375rem; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; align-items: center;
  margin: 1.25rem 0 .25rem; font-size: .9rem; }
.controls label { color: var(--soft); }
select, .switch { font: inherit; font-size: .9rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--rule); border-radius: .4rem; padding: .25rem .6rem; }
.switch { cursor: pointer; white-space: nowrap; }
.switch[aria-pressed=true] { background: var(--bad-wash); color: var(--bad);
  border-color: currentColor; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 1rem; }
.answer, .entry { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: 1rem 1.2rem; }
.answer h3 { color: var(--soft); font-size: .875rem; font-weight: 400; margin-bottom: .4rem; }
.guess { display: grid; grid-template-columns: minmax(0, 8rem) 1fr 3.6rem; gap: .6rem;
  align-items: center; line-height: 1.7; }
.guess.first { font-weight: 600; }
.guess span:last-child { text-align: right; color: var(--soft); font-weight: 400; }
.guess .fill { width: calc(var(--share, 0) * 100%); transition: width .2s; }
.delta { margin: .5rem 0 0; font-size: .9rem; }
.delta.down { color: var(--bad); } .delta.up { color: var(--good); }
.list { display: grid; gap: .8rem; margin-top: 1rem; }
.entry { display: grid; grid-template-columns: minmax(0, 1fr) 11rem; gap: .3rem 1.4rem; }
.entry.on { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.entry.off { opacity: .45; }
.entry h3 { overflow-wrap: anywhere; }
.entry .about { color: var(--soft); font-size: .8125rem; margin: 0; overflow-wrap: anywhere; }
.entry .words { margin: .3rem 0 0; overflow-wrap: anywhere; }
.entry .side { font-size: .8125rem; color: var(--soft); display: grid; gap: .35rem;
  align-content: start; }
.entry .fill { width: calc(var(--share, 0) * 100%); transition: width .15s; }
@media (max-width: 40rem) {
  .text { font-size: 1.35rem; } .entry { grid-template-columns: minmax(0, 1fr); }
}
"""

SCRIPT = """
"use strict";
let data, state, whole, place, texts, masks;
const $ = (id) => document.getElementById(id);
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
const percent = (share) => (100 * share).toFixed(1) + " %";
const points = (share) => (share < 0 ? "\\u2212" : "+") + Math.abs(100 * share).toFixed(1)
  + " points";
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
function share(read, token) {
  const heads = state.head < 0 ? read.attention : [read.attention[state.head]];
  return mean(heads.map((row) => (row.length > 1 ? row[token] : row[0])));
}
function given(mask) {
  const prediction = data.predictions[mask];
  return prediction.asked || prediction.guesses[0];
}
function now(mask) {
  return (state.off === null ? data : data.without[state.off]).predictions[mask];
}
const layer = () => data.layers[state.layer];
function bar(value) {
  const outer = make("span", "bar"), fill = make("span", "fill");
  fill.style.setProperty("--share", value);
  outer.append(fill);
  return outer;
}
function drawTokens() {
  const read = state.entry === null ? null : layer().entries.find((e) => e.id === state.entry);
  $("text").querySelectorAll(".token").forEach((element, token) => {
    element.style.setProperty("--share", read ? share(read, token) : 0);
    element.classList.toggle("on", state.token === token);
    element.setAttribute("aria-pressed", String(state.token === token));
    if (masks.includes(token)) {
      element.textContent = now(masks.indexOf(token)).guesses[0].token;
    }
  });
}
function drawAnswers() {
  const panel = $("answers");
  panel.replaceChildren();
  data.predictions.forEach((prediction, mask) => {
    const card = make("div", "answer");
    const name = masks.length > 1 ? "[MASK] " + (mask + 1) : "[MASK]";
    const how = state.off === null ? "as the model reads it"
      : state.off === whole ? "without any memory" : "without the entry switched off";
    card.append(make("h3", "", name + ", " + how));
    now(mask).guesses.forEach((guess, rank) => {
      const row = make("div", "guess" + (rank ? "" : " first"));
      row.append(make("span", "", guess.token), bar(guess.probability),
        make("span", "", percent(guess.probability)));
      card.append(row);
    });
    const before = given(mask);
    if (state.off === null) {
      if (prediction.asked) {
        const asked = "the answer " + before.token + ": " + percent(before.probability);
        card.append(make("p", "delta", asked));
      }
    } else {
      const after = now(mask).asked.probability, change = after - before.probability;
      card.append(make("p", "delta " + (change < 0 ? "down" : "up"), before.token + ": "
        + percent(before.probability) + " → " + percent(after) + " (" + points(change) + ")"));
    }
    panel.append(card);
  });
}
function drawEntries() {
  const looked = state.token === null ? masks : [state.token];
  const cards = $("entries").children;
  layer().entries.forEach((read, i) => {
    const card = cards[i], value = mean(looked.map((token) => share(read, token)));
    card.querySelector(".fill").style.setProperty("--share", value);
    card.querySelector(".read").textContent = "read " + percent(value)
      + (state.token === null ? " at the [MASK]" : " by the word pointed at");
    card.classList.toggle("on", state.entry === read.id);
    const off = state.off === place.get(read.id) || state.off === whole;
    card.classList.toggle("off", off);
    const button = card.querySelector(".switch");
    button.setAttribute("aria-pressed", String(off));
    button.textContent = off ? "switched off" : "switch off";
  });
  $("whole").setAttribute("aria-pressed", String(state.off === whole));
}
function draw() { drawTokens(); drawAnswers(); drawEntries(); }
function switchOff(number) {
  state.off = state.off === number ? null : number;
  draw();
}
function layOutEntries() {
  const list = $("entries");
  list.replaceChildren();
  layer().entries.forEach((read, rank) => {
    const entry = texts.get(read.id), card = make("article", "entry"), side = make("div", "side");
    const words = make("div", "");
    words.append(make("h3", "", (rank + 1) + ". " + (entry.title || "(no title)")));
    const score = "score " + read.score.toFixed(3);
    const about = [entry.domain, entry.source, "entry " + entry.id, score];
    words.append(make("p", "about", about.filter(Boolean).join(" · ")));
    const text = make("p", "words", entry.text);
    text.dir = "auto";
    words.append(text);
    const without = data.without[place.get(read.id)].predictions;
    const worth = masks.map((_, mask) => given(mask).token + " "
      + points(without[mask].asked.probability - given(mask).probability)).join(", ");
    const button = make("button", "switch", "switch off");
    button.type = "button";
    button.addEventListener("click", (event) => {
      event.stopPropagation();
      switchOff(place.get(read.id));
    });
    side.append(make("span", "read", ""), bar(0), make("span", "", "without it: " + worth), button);
    if (window.moreButtons) side.append(...window.moreButtons(entry, text));
    card.append(words, side);
    card.addEventListener("mouseenter", () => { state.entry = read.id; draw(); });
    card.addEventListener("mouseleave", () => { state.entry = null; draw(); });
    card.addEventListener("focusin", () => { state.entry = read.id; draw(); });
    list.append(card);
  });
}
function layOutText() {
  const paragraph = $("text");
  paragraph.replaceChildren();
  data.tokens.forEach((token, i) => {
    const piece = token.startsWith("##") && token.length > 2;
    const frame = token === "[CLS]" || token === "[SEP]";
    if (i && !piece && !/^[.,;:!?)'\\u2019]$/.test(token)) paragraph.append(" ");
    const element = make("button", "token" + (frame ? " frame" : "") +
      (masks.includes(i) ? " mask" : ""), piece ? token.slice(2) : token);
    element.type = "button";
    // What has a direction of its own has no say in the text's, which is found automatically.
    if (frame || masks.includes(i)) element.dir = "auto";
    element.addEventListener("mouseenter", () => { state.token = i; draw(); });
    element.addEventListener("mouseleave", () => { state.token = null; draw(); });
    element.addEventListener("focus", () => { state.token = i; draw(); });
    element.addEventListener("blur", () => { state.token = null; draw(); });
    paragraph.append(element);
  });
}
function option(select, value, name, chosen) {
  const element = make("option", "", name);
  element.value = value;
  element.selected = chosen;
  select.append(element);
}
function layOutControls() {
  $("layer").replaceChildren();
  $("head").replaceChildren();
  data.layers.forEach((one, i) => option($("layer"), i, "layer " + one.layer, i === state.layer));
  const heads = layer().entries[0].attention.length;
  option($("head"), -1, "all heads", true);
  for (let head = 0; head < heads && heads > 1; head++) {
    option($("head"), head, "head " + (head + 1));
  }
}
function show(explanation) {
  data = explanation;
  state = { layer: data.layers.length - 1, head: -1, token: null, entry: null, off: null };
  whole = data.without.length - 1;
  place = new Map(data.without.map((one, i) => [one.id, i]));
  texts = new Map(data.entries.map((entry) => [entry.id, entry]));
  masks = data.predictions.map((prediction) => prediction.position);
  layOutText();
  layOutControls();
  layOutEntries();
  draw();
}
$("layer").addEventListener("change", (event) => {
  state.layer = Number(event.target.value);
  layOutEntries();
  draw();
});
$("head").addEventListener("change", (event) => {
  state.head = Number(event.target.value);
  draw();
});
$("whole").addEventListener("click", () => switchOff(whole));
"""

PAGE_SCRIPT = """
show(JSON.parse(document.getElementById("data").textContent));
"""
