"""CSS of the report. Colours are CSS variables; figures and the dashboard use the same names."""

from __future__ import annotations

__all__ = ["CHOSEN_SCHEMES", "SCHEMES", "STYLE"]

_LIGHT = """\
  --paper: #fdfcfa; --panel: #f6f4ef; --ink: #1e2428; --muted: #5b646b; --rule: #ddd8ce;
  --accent: #0f6b6b; --ochre: #96590a; --violet: #6858a6; --alarm: #a3312a; --alarm-panel: #fbeeec;
  --s0: #0f6b6b; --s1: #b3560c; --s2: #5c56a8; --s3: #a02f62; --s4: #47791f; --s5: #2a6cab;
  --s6: #846800; --s7: #6a6f73;
"""
_DARK = """\
  --paper: #15191c; --panel: #1c2125; --ink: #e3e5e3; --muted: #9ba5ac; --rule: #30373c;
  --accent: #58bdb5; --ochre: #e2a04e; --violet: #a79fe8; --alarm: #f09a90; --alarm-panel: #2c1e1d;
  --s0: #58bdb5; --s1: #ef9d58; --s2: #a79fe8; --s3: #e48ab3; --s4: #98cb6d; --s5: #7cb5ea;
  --s6: #d5bb50; --s7: #b3bac0;
"""
SCHEMES = f"""
:root {{
  color-scheme: light dark;
{_LIGHT}  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, "Noto Serif", Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}}
@media screen and (prefers-color-scheme: dark) {{
  :root {{
{_DARK}  }}
}}
"""
"""Colours and fonts as CSS variables, light or dark by the setting of the reader's system."""

CHOSEN_SCHEMES = f"""
:root[data-theme="light"] {{
  color-scheme: light;
{_LIGHT}}}
:root[data-theme="dark"] {{
  color-scheme: dark;
{_DARK}}}
"""
"""To be placed after `SCHEMES` on pages where the reader can choose light or dark."""

STYLE = (
    SCHEMES
    + """\
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans); }
main, header, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.75rem; }
header { padding-top: 3.5rem; }
.kicker { margin: 0 0 .35rem; color: var(--muted); font-size: .875rem; }
h1 { margin: 0; font: 600 2.25rem/1.15 var(--serif); letter-spacing: -.01em; overflow-wrap: anywhere; }
.facts { margin: .7rem 0 0; color: var(--muted); font-size: .9375rem; }
.facts span + span::before { content: "·"; margin: 0 .55em; }
.facts span { white-space: nowrap; }
.state { color: var(--ink); font-weight: 600; }
.headline { max-width: 44rem; margin: 1.6rem 0 0; font: 1.1875rem/1.55 var(--serif); text-wrap: pretty; }
.alarm { margin: 1.6rem 0 0; padding: .8rem 1.1rem; border-left: 3px solid var(--alarm);
  background: var(--alarm-panel); overflow-wrap: anywhere; }
.alarm strong { color: var(--alarm); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1.5rem 2rem;
  margin: 2.2rem 0 0; padding: 1.35rem 0; border: solid var(--rule); border-width: 1px 0; }
.numbers > div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.numbers dt { color: var(--muted); font-size: .875rem; line-height: 1.35; }
.numbers dd { margin: 0 0 .15rem; font: 600 1.75rem/1.2 var(--serif); font-variant-numeric: lining-nums; }
section { margin-top: 3.25rem; }
h2 { margin: 0 0 .5rem; font: 600 1.375rem/1.25 var(--serif); }
p { margin: 0 0 .9rem; max-width: 44rem; text-wrap: pretty; }
.note, figcaption { color: var(--muted); font-size: .875rem; line-height: 1.5; }
.wide + .note { margin-top: .8rem; }
.quiet { color: var(--muted); font-style: italic; }
.wide { overflow-x: auto; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem;
  font-variant-numeric: tabular-nums lining-nums; }
table.even { table-layout: fixed; min-width: 40rem; }
table.even th:first-child { width: 27%; }
caption { text-align: left; color: var(--muted); font-size: .875rem; padding-bottom: .5rem; }
th, td { padding: .42rem .9rem .42rem 0; text-align: right; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: .875rem; border-bottom: 1px solid var(--rule);
  vertical-align: bottom; }
tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 7.5rem; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
th:first-child, .text { text-align: left; }
td.text { overflow-wrap: anywhere; }
td.best { font-weight: 650; }
tr.federated > * { background: color-mix(in srgb, var(--accent) 8%, transparent); }
tr.federated > th { font-weight: 600; }
th small { display: block; color: var(--muted); font-weight: 400; font-size: .8125rem; line-height: 1.35; }
figure { margin: 1.1rem 0 0; }
.figure { display: block; width: 100%; min-width: 36rem; height: auto; font-family: var(--sans);
  font-variant-numeric: tabular-nums; }
.figure * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-top: .6rem; max-width: 44rem; }
dl.study { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1.6rem;
  margin: 1rem 0 0; }
dl.study dt { color: var(--muted); }
dl.study dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: 1.1rem; }
summary { cursor: pointer; color: var(--accent); width: fit-content; }
details > :not(summary) { margin-top: .8rem; }
pre { margin: 0; padding: 1rem 1.15rem; background: var(--panel); font: .8125rem/1.6 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 4rem; margin-bottom: 3rem; color: var(--muted); font-size: .875rem; }
footer p { padding-top: 1.1rem; border-top: 1px solid var(--rule); max-width: none; }
@media (max-width: 40rem) {
  header { padding-top: 2rem; }
  main, header, footer { padding-left: 1.1rem; padding-right: 1.1rem; }
  h1 { font-size: 1.75rem; }
  dl.study { grid-template-columns: 1fr; gap: 0; }
  dl.study dd { margin-bottom: .6rem; }
}
@media print {
  @page { margin: 18mm 16mm; }
  :root { color-scheme: light; --paper: #fff; --panel: #f7f7f5; }
  body { font-size: 9.5pt; }
  main, header, footer { max-width: none; padding: 0; }
  section { margin-top: 1.8rem; }
  figure, .numbers, .alarm, tr { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  thead { display: table-header-group; }
  .wide { overflow: visible; }
  .figure { min-width: 0; }
  tr.federated > * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details.rounds { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
)
