"""The report's one style sheet: system fonts, light and dark, paper."""

from __future__ import annotations

STYLE = """
:root {
  --page: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #5a5f68; --rule: #dedbd4;
  --faint: #eeebe5; --accent: #1f5fa8; --second: #a8480c; --third: #52606d;
  --good: #1a6b3c; --good-wash: #dff0e4; --bad: #9b2c2c; --bad-wash: #f7e3e0;
  --mark: #fbe7a1; --quiet: #7f848d; --band: .16;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171b; --card: #1c1f24; --ink: #e8e6e1; --soft: #a5a9b1; --rule: #363a42;
    --faint: #272b31; --accent: #7fb2ee; --second: #f0a06a; --third: #a9b4c0;
    --good: #86d3a2; --good-wash: #1d3a29; --bad: #f0a49c; --bad-wash: #43241f;
    --mark: #5d4c10; --quiet: #7d838d; --band: .34;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 4rem; max-width: 66rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    sans-serif;
  font-variant-numeric: tabular-nums;
}
h1, h2, .verdict, .sentence, .entries p:not(:last-child) {
  font-family: Charter, "Bitstream Charter", "Iowan Old Style", "Sitka Text", Cambria,
    "Noto Serif", "Liberation Serif", Georgia, serif;
}
p { max-width: 44rem; margin: .5rem 0 1rem; }
h1 { font-size: 2.6rem; line-height: 1.15; margin: 0; overflow-wrap: anywhere; font-weight: 600; }
h2 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; font-weight: 600; }
h3 { font-size: 1rem; line-height: 1.4; margin: 0; font-weight: 600; }
section { margin-top: 3.5rem; }
.eyebrow { margin: 0 0 .25rem; color: var(--soft); font-size: .875rem; letter-spacing: .02em; }
.verdict { font-size: 1.3rem; line-height: 1.5; margin: 1rem 0 1.5rem; max-width: 42rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; padding: .75rem 0;
  border-block: 1px solid var(--rule); font-size: .9rem; }
a { color: var(--accent); text-underline-offset: .2em; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.absent { color: var(--soft); font-style: italic; }
.warning { background: var(--bad-wash); color: var(--bad); padding: .6rem .9rem;
  border-radius: .4rem; max-width: none; margin-top: 1.25rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule);
  color: var(--soft); font-size: .875rem; }

dl, dd, ol, ul { margin: 0; padding: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr));
  gap: 1.5rem 1.1rem; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .5rem; }
.tiles dt { color: var(--soft); font-size: .875rem; }
.tiles dd { font-size: 1.9rem; line-height: 1.2; font-weight: 600; letter-spacing: -.01em; }
.tiles small { display: block; font-size: .8125rem; line-height: 1.4; font-weight: 400;
  color: var(--soft); letter-spacing: 0; margin-top: .2rem; }
.facts { margin-top: 1.25rem; max-width: 48rem; }
.facts div { display: grid; grid-template-columns: 10rem 1fr; gap: 1rem; padding: .4rem 0; }
.facts dt { font-weight: 600; }
.facts dd { color: var(--soft); overflow-wrap: anywhere; }

table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th { text-align: left; font-weight: 400; }
thead th, thead td { color: var(--soft); font-size: .8125rem; padding: .3rem .75rem .3rem 0;
  border-bottom: 1px solid var(--rule); vertical-align: bottom; }
.scroll { overflow-x: auto; }
.plain { width: auto; font-size: .875rem; }
.plain th, .plain td { text-align: right; padding: .25rem 1.25rem .25rem 0; white-space: nowrap; }
.plain thead th { white-space: normal; min-width: 5.5rem; }
.edits { min-width: 44rem; }
.edits td { padding: .5rem 1.25rem .5rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
.edits td:first-child { width: 52%; }
.evaluation { min-width: 38rem; }
.evaluation th[scope=rowgroup] { padding: 1.4rem 0 .5rem; border-bottom: 1px solid var(--rule); }
.evaluation tbody tr:not(:first-child) > * { padding: .45rem .75rem .45rem 0;
  border-bottom: 1px solid var(--faint); white-space: nowrap; }
.evaluation td:nth-child(3), .evaluation td:nth-child(6) { width: 21%; }
.evaluation td:nth-child(2), .evaluation td:nth-child(4), .evaluation td:nth-child(5),
.evaluation thead th:nth-child(2), .evaluation thead th:nth-child(4),
.evaluation thead th:nth-child(5) { text-align: right; }
.shares { width: auto; min-width: 24rem; font-size: .9rem; margin: .4rem 0 1rem; }
.shares td:nth-child(2) { width: 14rem; padding: 0 1rem; }
.case { font-weight: 600; margin-right: .75rem; }
.rate { color: var(--accent); }
.note { display: block; color: var(--soft); font-size: .875rem; max-width: 44rem; }
.own > * { font-weight: 600; }

.bar { display: inline-block; vertical-align: middle; width: 100%; height: .55rem;
  background: var(--faint); border-radius: 2px; overflow: hidden; }
.fill { display: block; height: 100%; background: var(--accent); border-radius: 2px; }
.fill.quiet { background: var(--quiet); }

.sample { background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: 1.4rem 1.6rem; margin-top: 1.5rem; }
.sample h3 { color: var(--soft); font-size: .875rem; font-weight: 400; }
.sentence { font-size: 1.22rem; line-height: 1.75; max-width: 46rem; margin: .25rem 0 1.25rem; }
.masked { padding: .05em .3em; border-radius: .25em; white-space: nowrap;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.told { background: var(--good-wash); color: var(--good); border-bottom: 2px solid; }
.missed { background: var(--bad-wash); color: var(--bad); border-bottom: 2px dotted; }
sup { font-size: .68em; line-height: 0; margin-left: .15em; }
th > sup { margin: 0; }
.guesses { margin-bottom: 1.25rem; table-layout: fixed; }
.guesses thead th:first-child { width: 24%; }
.guesses tbody > tr > * { vertical-align: top; padding: .6rem 1.5rem .6rem 0;
  border-bottom: 1px solid var(--faint); overflow-wrap: anywhere; }
.guesses tbody th { font-weight: 600; }
.guesses ol { list-style: none; }
.guesses li { display: grid; grid-template-columns: minmax(0, 9.5rem) minmax(2rem, 1fr) 2.6rem;
  gap: .6rem; align-items: center; color: var(--soft); line-height: 1.55; }
.guesses li.right { color: var(--ink); font-weight: 600; }
.yes { color: var(--good); font-weight: 600; }
.share { font-size: .8125rem; text-align: right; color: var(--soft); font-weight: 400;
  white-space: nowrap; }
details { margin-top: .75rem; }
summary { cursor: pointer; color: var(--accent); font-size: .9375rem; padding: .2rem 0; }
details ul { padding: .25rem 0 0 1.2rem; font-size: .9rem; }
.entries { list-style: none; }
.entries li { padding: .9rem 0 .7rem; border-top: 1px solid var(--faint); }
.entries li:first-child { border-top: 0; }
.entries li { display: grid; grid-template-columns: 8rem minmax(0, 1fr); gap: 0 1.75rem; }
.entries h4 { margin: 0; font-size: .9375rem; font-weight: 600; overflow-wrap: anywhere; }
.badge { font-size: .75rem; font-weight: 400; padding: .05rem .5rem; border-radius: 1rem;
  margin-left: .6rem; color: var(--good); background: var(--good-wash); white-space: nowrap; }
.weight { font-size: .8125rem; line-height: 1.5; padding-top: .1rem; color: var(--soft); }
.weight b { color: var(--ink); font-weight: 600; }
.weight .bar { display: block; margin: .2rem 0; }
.entries p { margin: .1rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.entries p:last-child { color: var(--soft); font-size: .8125rem; }
mark { background: var(--mark); color: inherit; padding: 0 .12em; border-radius: .15em; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr));
  gap: 2.25rem 2rem; margin: 1.5rem 0; }
.chart { margin: 0; display: flex; flex-direction: column; justify-content: flex-end;
  break-inside: avoid; }
.chart figcaption { margin-bottom: auto; padding-bottom: .35rem; }
.chart figcaption p { margin: 0; color: var(--soft); font-size: .875rem; line-height: 1.45; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .875rem;
  color: var(--soft); }
.legend li { display: flex; align-items: center; gap: .4rem; }
.key { width: 1.1rem; height: 0; border-top: 3px solid var(--accent); }
.key.tone1 { border-color: var(--second); border-style: dashed; }
.key.tone2 { border-color: var(--third); border-style: dotted; }
.key.mark { width: 0; height: 1rem; border-top: 0; border-left: 2px dotted var(--second); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12.5px; fill: var(--soft); }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
.grid { stroke: var(--rule); stroke-width: .75; }
.axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.line.tone1 { stroke: var(--second); stroke-dasharray: 7 3; }
.line.tone2 { stroke: var(--third); stroke-dasharray: 2 3; }
.band { fill: var(--accent); opacity: var(--band); }
.band.tone1 { fill: var(--second); }
.band.tone2 { fill: var(--third); }
.dot { fill: var(--accent); stroke: var(--page); stroke-width: 1.5; }
.dot.tone1 { fill: var(--second); }
.dot.tone2 { fill: var(--third); }
g.mark line { stroke: var(--second); stroke-width: 1.25; stroke-dasharray: 2 3; }
g.mark path { fill: var(--second); }
.hit { opacity: 0; }
.hit:hover { opacity: 1; }
.hit rect { fill: transparent; }
.hit line { stroke: var(--soft); stroke-width: 1; }
.hit text { fill: var(--ink); paint-order: stroke; stroke: var(--page); stroke-width: 6px; }

.settings { columns: 18rem; column-gap: 2.5rem; }
.settings > div { break-inside: avoid; margin-bottom: 1.5rem; }
.settings dl { font-size: .875rem; margin-top: .3rem; }
.settings dl div { display: flex; justify-content: space-between; gap: 1rem;
  border-top: 1px solid var(--faint); padding: .2rem 0; }
.settings dt { color: var(--soft); }
.settings dd { text-align: right; overflow-wrap: anywhere; }

@media (max-width: 40rem) {
  body { padding: 1.75rem 1rem 3rem; }
  h1 { font-size: 2rem; }
  .sample { padding: 1rem; }
  .facts div, .entries li { grid-template-columns: 1fr; gap: 0; }
  .guesses, .guesses tbody, .guesses tr, .guesses th, .guesses td { display: block; }
  .guesses thead { position: absolute; clip-path: inset(50%); }
  .guesses tbody > tr > * { border: 0; padding: .3rem 0; }
  .guesses td::before { content: "with the memory"; color: var(--soft); font-size: .8125rem; }
  .guesses td:last-child::before { content: "without"; }
  .evaluation { min-width: 0; }
  .evaluation tr > :nth-child(3), .evaluation tr > :nth-child(6) { display: none; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  :root {
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #bbb; --faint: #e5e5e5;
    --accent: #1f5fa8; --second: #a8480c; --third: #52606d; --good: #1a6b3c;
    --good-wash: #dff0e4; --bad: #9b2c2c; --bad-wash: #f7e3e0; --mark: #fbe7a1; --quiet: #777;
    --band: .2;
  }
  body { max-width: none; padding: 0; font-size: 10.5pt;
    -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  nav { display: none; }
  .charts { grid-template-columns: 1fr 1fr; gap: 1.25rem; }
  .sample, .entries li, tbody, .tiles { break-inside: avoid; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; }
  h2, h3, summary { break-after: avoid; }
}
"""
