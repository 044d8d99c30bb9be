"""The style sheet of the pages: one column on a phone, light and dark as the reader's system is.

Colours of lines and words have a contrast of at least 4.5 to 1 against their background, in both schemes.
"""

STYLE = (
    """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --text: #1b1f24; --soft: #57606a; --rule: #d5d9de;
  --link: #0550ae; --good: #116329; --bad: #a40e26; --c0: #0060a8; --c1: #b83a09; --c2: #00704f; --c3: #8f3179;
  --c4: #765c00; --c5: #4d5666; --c6: #5b3fc4; --c7: #9a3412;
  --p1: #e3effb; --p2: #bfdcf7; --p3: #8cc0ef; --p4: #5aa5e8; --n1: #fdebdd; --n2: #fbd0b0; --n3: #f5a673;
  --n4: #ee8246; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1318; --card: #181d24; --text: #e6e9ee; --soft: #a2acb8;
  --rule: #343c47; --link: #7cb7ff; --good: #56d182; --bad: #ff8a8a; --c0: #62b0f7; --c1: #ff9159; --c2: #41cf9f;
  --c3: #e391d3; --c4: #dcbd48; --c5: #aab3c0; --c6: #ac9bff; --c7: #f2a97e;
  --p1: #142b42; --p2: #17406a; --p3: #1a5691; --p4: #1e6cb6; --n1: #3a2416; --n2: #5e3417; --n3: #834417;
  --n4: #a85317; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 16px 16px 64px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 4px; } section > h3 { margin-top: 20px; }
p { margin: 6px 0; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--link); }
.note, figcaption, caption { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); gap: 12px;
  margin: 12px 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px;
  overflow-wrap: anywhere; }
.tiles .big { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px;
  min-width: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.band { opacity: .18; }
.hit { fill: transparent; }
.hit:hover { fill: var(--text); opacity: .1; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0; list-style: none;
  font-size: .875rem; }
.legend li { overflow-wrap: anywhere; }
.key { display: inline-block; width: 18px; height: 10px; margin-right: 5px; vertical-align: baseline; }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; padding: 4px 0; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
td, tbody th { overflow-wrap: anywhere; min-width: 9ch; } .numbers td { min-width: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; } .numbers tbody th { overflow-wrap: break-word; min-width: 0; }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre, .tokens { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .875rem; }
pre, .tokens { margin: 6px 0; padding: 8px 10px; background: var(--back); border: 1px solid var(--rule); border-radius:
  6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens { line-height: 1.9; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px;
  margin: 12px 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 12px; }
.pair > div { min-width: 0; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
mark { background: var(--p2); color: inherit; border-radius: 2px; }
.alarm { border-left: 4px solid var(--bad); }
summary { cursor: pointer; padding: 6px 0; font-weight: 600; }
.t { border-radius: 3px; padding: 2px 0; } .tokens .t:hover { outline: 2px solid var(--text); }
.p3, .p4, .n3, .n4 { color: #000; }
.off { color: var(--soft); border-bottom: 1px dotted var(--soft); }
.clash { text-decoration: underline double; text-underline-offset: 3px; }
@media (prefers-color-scheme: dark) { .p3, .p4, .n3, .n4 { color: #fff; } }
"""
    + "".join(f".{sign}{i} {{ background: var(--{sign}{i}); }}\n" for sign in "pn" for i in range(1, 5))
    + "".join(
        f".s{i} {{ stroke: var(--c{i % 8}); }} .f{i} {{ fill: var(--c{i % 8}); }} "
        f".b{i} {{ background: var(--c{i % 8}); }}\n"
        for i in range(16)
    )
    + "".join(f".s{i} {{ stroke-dasharray: 6 3; }}\n" for i in range(8, 16))
)
