"""The page at `/`: a form of a bundle's columns, which scores a row by hand. It needs nothing from elsewhere."""

from typing import Final

PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rechub_dist</title>
<style>
:root { color-scheme: light dark; --line: #8884; --faint: #8882; --accent: #2f6fdb; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 46rem; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; }
p { margin: .3rem 0 1rem; opacity: .8; }
label { display: block; margin: 0 0 .8rem; }
label b { font-weight: 600; overflow-wrap: anywhere; }
label small { opacity: .7; margin-left: .4rem; }
input, select, button { font: inherit; padding: .45rem .6rem; border: 1px solid var(--line); border-radius: .4rem; }
input, select { width: 100%; background: var(--faint); color: inherit; }
input:focus-visible, select:focus-visible, button:focus-visible { outline: 2px solid var(--accent); }
button { background: var(--accent); color: #fff; border: 0; padding: .55rem 1.4rem; cursor: pointer; }
#choice { display: grid; grid-template-columns: 1fr 1fr; gap: 0 .8rem; }
#fields { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 .8rem; }
#answer { margin-top: 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td { font-variant-numeric: tabular-nums; }
.error { border-left: 4px solid #d33; padding-left: .8rem; }
[hidden] { display: none !important; }
</style>
<h1 id="title">rechub_dist</h1>
<p id="about">One row at a time. Values are JSON: 3, "word", [1, 2], null; other text is taken as a word.</p>
<label id="access" hidden><b>Token</b><input id="token" type="password" autocomplete="off"></label>
<form id="form">
<div id="choice">
<label><b>Bundle</b><select id="bundle"></select></label>
<label><b>Ask for</b><select id="operation"></select></label>
</div>
<div id="fields"></div>
<button>Send</button>
</form>
<div id="answer" role="status"></div>
<script>
"use strict";
const at = id => document.getElementById(id);
function make(tag, text = "") { const e = document.createElement(tag); e.textContent = text; return e; }
let bundles = {};

function headers() {
  const token = at("token").value;
  return token ? {Authorization: "Bearer " + token} : {};
}
function fail(text) { const e = make("div", text); e.className = "error"; at("answer").replaceChildren(e); }

async function load() {
  const answer = await fetch("bundles", {headers: headers()});
  at("access").hidden = answer.status !== 401 && !at("token").value;
  const found = await answer.json();
  if (!answer.ok) { fail(found.detail); return; }
  at("answer").replaceChildren();
  bundles = found;
  at("bundle").replaceChildren(...Object.keys(bundles).map(name => make("option", name)));
  choose();
}
function choose() {
  const one = bundles[at("bundle").value];
  at("title").textContent = one.model + ", step " + one.step;
  const wanted = one.operations.flatMap(o => o === "vectors" ? ["vectors of a user", "vectors of an item"] : [o]);
  at("operation").replaceChildren(...wanted.map(o => make("option", o)));
  fields();
}
function part() {
  const operation = at("operation").value;
  return operation === "score" ? "score" : operation.endsWith("item") ? "item" : "user";
}
function fields() {
  const one = bundles[at("bundle").value], example = one.examples[part()];
  at("fields").replaceChildren(...one.columns[part()].map(column => {
    const label = make("label"), input = make("input");
    const type = column.type + (column.needed ? "" : "; may be left empty");
    label.append(make("b", column.name), make("small", type), input);
    input.name = column.name;
    input.value = column.name in example ? JSON.stringify(example[column.name]) : "";
    return label;
  }));
}
function value(text) { try { return JSON.parse(text); } catch { return text; } }

async function send(event) {
  event.preventDefault();
  const row = {};
  for (const input of at("fields").querySelectorAll("input"))
    if (input.value.trim() !== "") row[input.name] = value(input.value);
  const operation = at("operation").value.split(" ")[0];
  const query = operation === "vectors" ? "?side=" + part() : "";
  const answer = await fetch("bundles/" + at("bundle").value + "/" + operation + query, {
    method: "POST", headers: {"Content-Type": "application/json", ...headers()}, body: JSON.stringify({rows: [row]}),
  });
  const found = await answer.json();
  if (!answer.ok) { fail(answer.status + ": " + found.detail); return; }
  const table = make("table");
  for (const [name, values] of Object.entries(found.columns)) {
    const line = table.insertRow();
    line.append(make("th", name), make("td", JSON.stringify(values[0])));
  }
  const line = table.insertRow();
  line.append(make("th", "version"), make("td", found.version));
  at("answer").replaceChildren(table);
}
const told = work => async event => { try { await work(event); } catch (error) { fail(String(error)); } };
at("bundle").addEventListener("change", choose);
at("operation").addEventListener("change", fields);
at("token").addEventListener("change", told(load));
at("form").addEventListener("submit", event => told(send)(event));
told(load)();
</script>
</html>
"""
