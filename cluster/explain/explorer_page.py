"""The explorer's page: a question, its explanation, and the memory's knobs beside it."""

from __future__ import annotations

from cluster.explain.page import answer_parts, document
from cluster.explain.page_assets import SCRIPT
from trainer.report.markup import Html, tag

_STYLE = """
form { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 0; }
input, textarea { font: inherit; color: var(--ink); background: var(--card);
  border: 1px solid var(--rule); border-radius: .4rem; padding: .5rem .75rem; }
#question { flex: 1 1 22rem; font-size: 1.05rem; } #answer { flex: 0 1 11rem; }
textarea { width: 100%; min-height: 4.5rem; margin-top: .4rem; }
.go { font: inherit; font-weight: 600; cursor: pointer; color: var(--card);
  background: var(--accent); border: 0; border-radius: .4rem; padding: .5rem 1.1rem; }
.go:disabled { opacity: .5; }
.memory { border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem 1.2rem;
  margin: 1.25rem 0; }
.memory h2 { font-size: 1.05rem; margin: 0; }
.domains { display: flex; flex-wrap: wrap; gap: .5rem; margin: .6rem 0; }
#status { min-height: 1.6em; margin: .5rem 0 0; color: var(--soft); }
#status.wrong { color: var(--bad); }
.hidden { display: none; }
"""

_SCRIPT = """
async function call(name, given) {
  const reply = await fetch(name, { method: "POST", body: JSON.stringify(given || {}),
    headers: { "Content-Type": "application/json" } });
  const told = await reply.json();
  if (!reply.ok) throw new Error(told.error);
  return told;
}
let busy = false;
async function working(what, work) {
  if (busy) return;
  busy = true;
  $("status").className = "";
  $("status").textContent = what;
  try {
    await work();
    $("status").textContent = "";
  } catch (error) {
    $("status").className = "wrong";
    $("status").textContent = error.message;
  } finally { busy = false; }
}
function drawState(told) {
  const count = told.entries.toLocaleString("en");
  $("holds").textContent = count + " entries; last change: " + told.message;
  $("domains").replaceChildren(...told.domains.map((domain) => {
    const count = domain.plugged ? " (" + domain.entries.toLocaleString("en") + ")" : ", unplugged";
    const button = make("button", "switch", domain.name + count);
    button.type = "button";
    button.setAttribute("aria-pressed", String(!domain.plugged));
    button.title = domain.plugged ? "unplug this domain" : "plug this domain in again";
    button.addEventListener("click", () => change(domain.plugged ? "unplug" : "plug",
      { domain: domain.name }));
    return button;
  }));
  $("undo").disabled = !told.undo;
}
async function askAgain() {
  const told = await call("ask", { text: $("question").value, answer: $("answer").value.trim() });
  $("told").classList.remove("hidden");
  show(told.explanation);
}
const ask = () => working("reading ...", askAgain);
const change = (name, given) => working("changing the memory ...", async () => {
  drawState(await call(name, given));
  if (data) await askAgain();
});
window.moreButtons = (entry, text) => {
  const edit = make("button", "switch edit", "edit the text");
  const remove = make("button", "switch", "remove");
  edit.type = remove.type = "button";
  edit.addEventListener("click", () => {
    const area = make("textarea", "");
    area.value = entry.text;
    text.replaceWith(area);
    area.focus();
    const save = make("button", "go save", "save");
    save.type = "button";
    save.addEventListener("click", () => change("edit", { id: entry.id, text: area.value }));
    edit.replaceWith(save);
  });
  remove.addEventListener("click", () => change("remove", { id: entry.id }));
  return [edit, remove];
};
$("asking").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("adding").addEventListener("submit", (event) => {
  event.preventDefault();
  change("add", { text: $("new").value, title: "" }).then(() => { $("new").value = ""; });
});
$("undo").addEventListener("click", () => change("undo"));
working("", async () => drawState(await call("state")));
"""


def render_explorer(note: str) -> Html:
    """The page; `note` says which store is edited."""
    question = tag(
        "input",
        id="question",
        aria_label="Text with [MASK]",
        placeholder="The capital of Portugal is [MASK].",
        autocomplete="off",
        required=True,
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("p", "PlugLM · explorer", class_="eyebrow"),
            tag("h1", "What does it read?"),
            tag(
                "form",
                question,
                tag(
                    "input", id="answer", aria_label="Follow this word", placeholder="follow a word"
                ),
                tag("button", "Ask", class_="go", type="submit"),
                id="asking",
            ),
            tag("p", id="status", role="status"),
        ),
        tag(
            "section",
            tag("h2", "The memory"),
            tag("p", id="holds", class_="hint"),
            tag("div", id="domains", class_="domains"),
            tag(
                "form",
                tag("input", id="new", aria_label="New text", placeholder="add a sentence to know"),
                tag("button", "Add", class_="switch", type="submit"),
                tag("button", "Undo the last change", id="undo", class_="switch", type="button"),
                id="adding",
            ),
            tag("p", note, class_="hint"),
            class_="memory",
            style="margin-top: 1.25rem",
        ),
        tag(
            "main",
            tag("p", id="text", class_="text", dir="auto"),
            *answer_parts(),
            id="told",
            class_="hidden",
        ),
        tag("script", Html(SCRIPT + _SCRIPT)),
    )
    return document("PlugLM explorer", body, script=SCRIPT + _SCRIPT, connects=True, style=_STYLE)
