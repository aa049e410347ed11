"""The look of every page: one style sheet and one small script, both inline. Pages are complete without the script."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --card: #f5f7f9; --soft: #57606a; --rule: #d5d9df;
  --good: #1a7f45; --bad: #b3261e; --heat: 37, 99, 184;
  --c0: #2563b8; --c1: #b64d12; --c2: #24754a; --c3: #8445ad; --c4: #86690b; --c5: #b03a5b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171b; --card: #1d2127; --soft: #9aa3ad;
  --rule: #343a42; --good: #5cc98a; --bad: #ff8a80; --heat: 111, 168, 238;
  --c0: #6fa8ee; --c1: #f0995f; --c2: #6cc48f; --c3: #c493e6; --c4: #dcbf5a; --c5: #ec8aa5; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .2rem 0 .8rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; } p { margin: .5rem 0; max-width: 46rem; }
p.facts, p.legend, p.note, figcaption { color: var(--soft); font-size: .9rem; }
figcaption { font-weight: 600; margin-bottom: .35rem; }
figure { margin: 1.1rem 0 1.4rem; break-inside: avoid; } svg { width: 100%; height: auto; display: block; }
figure > svg { max-width: 40rem; }
.verdict { display: flex; gap: .9rem; align-items: center; border-left: 6px solid var(--good); background: var(--card);
  border-radius: 6px; padding: .8rem 1rem; margin: 0 0 1rem; } .verdict.failed { border-color: var(--bad); }
.verdict .sign { font-size: 1.9rem; line-height: 1; color: var(--good); } .verdict.failed .sign { color: var(--bad); }
.verdict strong { display: block; font-size: 1.15rem; } .verdict p { margin: 0; color: var(--soft); }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); margin: 0 0 1rem; }
.tile { background: var(--card); border-radius: 6px; padding: .7rem .9rem; break-inside: avoid; }
.tile dt { color: var(--soft); font-size: .85rem; } .tile dd { margin: 0; font-size: 1.45rem; font-weight: 650;
  line-height: 1.25; font-variant-numeric: tabular-nums; } .tile dd + dd { font-size: .85rem; font-weight: 400;
  color: var(--soft); line-height: 1.4; margin-top: .15rem; }
.label { font-size: 15px; fill: currentColor; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 0 2rem; }
.charts .label { font-size: 18px; } .grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 6 5; } .line.limit { stroke: var(--bad); }
.line.s0 { stroke: var(--c0); } .line.s1 { stroke: var(--c1); } .line.s2 { stroke: var(--c2); }
.line.s3 { stroke: var(--c3); } .line.s4 { stroke: var(--c4); } .line.s5 { stroke: var(--c5); }
.bar.s0, .mark.s0 { fill: var(--c0); } .bar.s1, .mark.s1 { fill: var(--c1); } .bar.s2, .mark.s2 { fill: var(--c2); }
.bar.s3, .mark.s3 { fill: var(--c3); } .bar.s4, .mark.s4 { fill: var(--c4); } .bar.s5, .mark.s5 { fill: var(--c5); }
.range { fill: var(--c0); fill-opacity: .35; } .whisker { stroke: var(--c0); stroke-width: 2; }
.median { stroke: var(--ink); stroke-width: 3; }
.key { margin-right: 1.1rem; } .key::before { content: "\\25CF "; } .key.limit::before { content: "\\2504 "; }
.key.s0::before { color: var(--c0); } .key.s1::before { color: var(--c1); } .key.s2::before { color: var(--c2); }
.key.s3::before { color: var(--c3); } .key.s4::before { color: var(--c4); } .key.s5::before { color: var(--c5); }
.key.limit::before { color: var(--bad); }
.bars { display: grid; grid-template-columns: minmax(5rem, 15rem) 1fr; gap: .3rem .7rem; font-size: .88rem;
  font-variant-numeric: tabular-nums; } .bars .name { text-align: right; align-self: center; line-height: 1.25; }
.bars .track { display: flex; align-items: center; gap: .5rem; min-height: 1.5rem; position: relative; }
.bars .fill { height: 1.05rem; border-radius: 2px; min-width: 2px; flex: none; }
.bars .limit { position: absolute; top: -.15rem; bottom: -.15rem; border-left: 2px dashed var(--bad); }
.fill.s0, .key-box.s0 { background: var(--c0); } .fill.s1, .key-box.s1 { background: var(--c1); }
.fill.s2, .key-box.s2 { background: var(--c2); } .fill.s3, .key-box.s3 { background: var(--c3); }
.fill.s4, .key-box.s4 { background: var(--c4); } .fill.s5, .key-box.s5 { background: var(--c5); }
.strips { display: grid; grid-template-columns: minmax(5rem, 15rem) 1fr; gap: 2px .7rem; font-size: .8rem; }
.strips .name { text-align: right; align-self: center; line-height: 1.15; } .strips svg { height: 1.35rem; }
.strips .foot { color: var(--soft); display: flex; justify-content: space-between; }
.empty { fill: var(--card); } .over { fill: var(--bad); } .on { fill: var(--c0); } .then { fill: var(--c1); }
.scale { display: inline-flex; gap: 2px; vertical-align: middle; margin: 0 .5rem; }
.scale i { width: 1.3rem; height: .8rem; background: rgb(var(--heat)); display: block; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .32rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap;
  font-variant-numeric: tabular-nums; vertical-align: top; overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, td.words { text-align: left; }
th.words { text-align: left; } td.words { white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
.yes { color: var(--good); }
.no { color: var(--bad); font-weight: 600; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--c0); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; } ul { padding-left: 1.2rem; }
code { font: .88em ui-monospace, monospace; }
@media (max-width: 640px) { th, td { padding: .3rem .45rem; } th[scope=row] { white-space: normal; }
  .label, .charts .label { font-size: 21px; } .line { stroke-width: 3; }
  .bars, .strips { grid-template-columns: 1fr; } .bars .name, .strips .name { text-align: left; margin-top: .35rem; }
  .bars .foot-space, .strips .foot-space { display: none; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --card: #f3f3f3; --soft: #444; --rule: #bbb;
  --good: #1a7f45; --bad: #b3261e; --heat: 37, 99, 184;
  --c0: #2563b8; --c1: #b64d12; --c2: #24754a; --c3: #8445ad; --c4: #86690b; --c5: #b03a5b; }
  * { print-color-adjust: exact; } @page { margin: 15mm; } body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2, h3, figcaption { break-after: avoid; } tr { break-inside: avoid; } .scroll { overflow: visible; }
  table { font-size: 8pt; } th, td { white-space: normal; padding: .2rem .35rem; } summary { list-style: none; } }
"""

# A click on the head of a column sorts by it: numbers by size, all else by the alphabet.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const number = (text) => { const found = parseFloat(text.replaceAll(",", "")); return isNaN(found) ? null : found; };
  const order = (a, b) => {
    const x = number(a), y = number(b);
    return x === null || y === null ? a.localeCompare(b) : x - y;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows];
      rows.sort((a, b) => (down ? -1 : 1) * order(a.cells[column].textContent, b.cells[column].textContent));
      body.append(...rows);
    });
  });
}
"""
