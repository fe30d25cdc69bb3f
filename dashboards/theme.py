"""The style of pages in a browser: colour tokens for light and dark, sizes, style sheets, icons and page parts.

Every colour, size and distance is a CSS variable (`--wb-ink`, `--wb-space`), so a style sheet names what a colour is
for. `PAIRS` lists which colours lie on each other; the tests compute their contrast (WCAG 2.2, AA). Everything here is
text: no file, font or script is fetched from another host.

panel-material-ui and panel-reactflow were considered. Both load a bundle of React components of several megabytes
before the first page is drawn, and a page here is to be there within two seconds; they bring their own tokens, which
would have to be kept equal to those of the figures; and nothing here edits a graph. Panel's native design with one
small style sheet does the same with 3 kB.
"""

from html import escape
from typing import Any, ClassVar

import panel as pn
from panel.theme.base import DarkTheme, DefaultTheme, Inherit
from panel.theme.native import Native

from workbench.figures.template import DARK, LIGHT, ThemeName

TOKENS: dict[ThemeName, dict[str, str]] = {
    "light": {
        "page": "#f4f6f8",
        "surface": LIGHT.paper,
        "raised": "#edf1f5",
        "ink": LIGHT.ink,
        "muted": "#56606d",
        "line": "#d9dee5",
        "control": "#7b8594",
        "accent": "#14508c",
        "on-accent": "#ffffff",
        "accent-soft": "#dfeaf5",
        "good": "#1b6b3a",
        "bad": "#a82a1f",
        "warn": "#7a4f00",
        "good-soft": "#e3f3e8",
        "bad-soft": "#fbe7e4",
        "warn-soft": "#fbf0d9",
    },
    "dark": {
        "page": "#0d1014",
        "surface": DARK.paper,
        "raised": "#1e232b",
        "ink": DARK.ink,
        "muted": "#a3adba",
        "line": "#2f3641",
        "control": "#748091",
        "accent": "#8cc4f2",
        "on-accent": "#0d1014",
        "accent-soft": "#1b3045",
        "good": "#7fd6a2",
        "bad": "#ff9d8e",
        "warn": "#f2c879",
        "good-soft": "#15301f",
        "bad-soft": "#3a1c18",
        "warn-soft": "#362a12",
    },
}
# text on a ground, and the least contrast that WCAG asks for: 4.5 for text, 3 for the edges of controls
PAIRS = (
    *((text, ground, 4.5) for text in ("ink", "muted", "accent") for ground in ("page", "surface", "raised")),
    *((text, "surface", 4.5) for text in ("good", "bad", "warn")),
    *((text, f"{text}-soft", 4.5) for text in ("good", "bad", "warn")),
    *(("ink", f"{ground}-soft", 4.5) for ground in ("good", "bad", "warn", "accent")),
    ("accent", "accent-soft", 4.5),
    ("on-accent", "accent", 4.5),
    ("control", "surface", 3.0),
    ("control", "page", 3.0),
)
_SIZES = {
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif",
    "small": "12px",
    "text": "14px",
    "lead": "16px",
    "title": "20px",
    "figure": "28px",
    "space": "12px",
    "radius": "8px",
}

# of the parts of a page: numbers, sentences, tables; also used by published pages and the report
PARTS_CSS = """
a{color:var(--wb-accent)}.bk-clearfix>p:first-child{margin-top:0}.bk-clearfix>p:last-child{margin-bottom:0}
a:focus-visible,button:focus-visible,summary:focus-visible{outline:3px solid var(--wb-accent);outline-offset:2px}
.wb-save{display:inline-block;box-sizing:border-box;min-width:52px;height:28px;margin:0 4px;padding:1px 8px;
font:inherit;font-size:12px;line-height:24px;text-align:center;text-decoration:none;cursor:pointer;
border:1px solid var(--wb-line,#d5d9e0);border-radius:4px;background:none;color:var(--wb-muted,#5a6472)}
.wb-save:hover,.wb-save:focus-visible{border-color:var(--wb-control,#7a8494);color:var(--wb-ink,#1f2430)}
.wb-save:focus-visible{outline:3px solid var(--wb-accent,#14508c);outline-offset:1px}
h2{font-size:var(--wb-title);line-height:1.3;margin:.2em 0}h3{font-size:var(--wb-lead);margin:.2em 0}
h3:not(:first-child){margin-top:.9em}
.wb-lead{font-size:var(--wb-lead);margin:0}.wb-muted{color:var(--wb-muted)}
.wb-first{margin:4px 0}
.wb-preview{color:var(--wb-muted);font-size:13px}details[open]>summary .wb-preview{display:none}
.wb-under{color:var(--wb-muted);font-size:13px;margin:-2px 0 2px 2px}
.wb-tiles{display:flex;flex-wrap:wrap;gap:var(--wb-space);margin:10px 0}
.wb-tile{flex:1 1 150px;background:var(--wb-surface);border:1px solid var(--wb-line);border-radius:var(--wb-radius);
padding:10px 14px}
.wb-tile b{display:block;font-size:clamp(20px,2.3vw,var(--wb-figure));font-weight:600;line-height:1.2;
white-space:nowrap;font-variant-numeric:tabular-nums}
.wb-tile span{color:var(--wb-muted);font-size:var(--wb-small)}
.wb-facts{display:flex;flex-wrap:wrap;gap:2px 18px;color:var(--wb-muted);font-size:13px}
.wb-facts b{color:var(--wb-ink);font-weight:600}
.wb-answers{margin:0;padding-left:1.3em}.wb-answers li{margin:.35em 0;line-height:1.5}
.wb-examples{margin:0;padding:0;list-style:none;font-family:'DejaVu Sans Mono',monospace;font-size:13px;
display:grid;grid-template-columns:max-content minmax(0,1fr);column-gap:14px}
.wb-examples li{display:grid;grid-column:1/-1;grid-template-columns:subgrid;padding:2px 0;
border-bottom:1px solid var(--wb-line)}
.wb-examples .wb-muted{text-align:right;font-variant-numeric:tabular-nums}
.wb-examples a{color:var(--wb-ink);text-decoration:none;white-space:pre;display:grid;
grid-template-columns:minmax(0,2fr) auto minmax(0,1fr)}
.wb-before{display:flex;justify-content:flex-end}.wb-before,.wb-after{overflow:hidden}
.wb-examples a:hover{text-decoration:underline}
mark{background:var(--wb-accent);color:var(--wb-on-accent);border-radius:3px;padding:0 2px}
mark.wb-shade{background:color-mix(in srgb,var(--wb-accent-soft) calc(100% - var(--share)),var(--wb-warn-soft));
white-space:pre;color:var(--wb-ink);
box-shadow:inset 0 -3px 0 color-mix(in srgb,var(--wb-accent) var(--share),transparent)}
.wb-special{color:var(--wb-muted);white-space:nowrap}mark.wb-own{outline:1px solid var(--wb-accent);font-weight:700}
pre{white-space:pre-wrap;background:var(--wb-raised);border-radius:6px;padding:8px 12px}
summary{cursor:pointer;padding:3px 0}th[data-sort]{cursor:pointer}th[aria-sort=ascending]::after{content:" \25B4"}
th[aria-sort=descending]::after{content:" \25BE"}tr:has(a){cursor:pointer}tbody tr:hover{background:var(--wb-raised)}
.wb-empty{background:var(--wb-surface);border:1px solid var(--wb-line);border-radius:var(--wb-radius);
padding:14px 20px;max-width:860px}
.wb-note{border-left:4px solid var(--wb-control);background:var(--wb-raised);border-radius:4px;padding:8px 12px;
margin:4px 0}
.wb-note.good{border-color:var(--wb-good);background:var(--wb-good-soft)}
.wb-note.warning{border-color:var(--wb-warn);background:var(--wb-warn-soft)}
.wb-note.danger{border-color:var(--wb-bad);background:var(--wb-bad-soft)}
.wb-chip{display:inline-block;border-radius:99px;padding:1px 9px;font-size:var(--wb-small);
background:var(--wb-accent-soft);color:var(--wb-ink)}
.wb-table{overflow-x:auto}.wb-table table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.wb-table td,.wb-table th{text-align:left;vertical-align:top;padding:5px 14px 5px 0;
border-bottom:1px solid var(--wb-line)}.wb-table th{color:var(--wb-muted);font-weight:600}
"""
# of every component: Panel draws each in a shadow root, which page styles do not reach. The buttons of number fields
# have no names for screen readers; the arrow keys do the same.
_COMPONENT_CSS = """
.bk-spin-btn{display:none!important}
:host{font-family:var(--wb-font);font-size:var(--wb-text);color:var(--wb-ink);color-scheme:var(--wb-scheme)}
.bk-input{background:var(--wb-surface);color:var(--wb-ink);border:1px solid var(--wb-control);border-radius:6px}
textarea.bk-input{padding:6px 12px}.bk-btn a{color:inherit;text-decoration:none}
select.bk-input{padding:0 2px 0 8px;appearance:auto!important;background-image:none!important}
.bk-input[type=file]{padding:0;line-height:30px;cursor:pointer}
.bk-input::file-selector-button{background:var(--wb-raised);color:var(--wb-ink);border:0;height:30px;
border-right:1px solid var(--wb-control);margin-right:8px;padding:0 12px;font:inherit}
.bk-input:focus{border-color:var(--wb-accent);box-shadow:0 0 0 2px var(--wb-accent-soft)}
.bk-btn,.bk-btn-default{background:var(--wb-surface)!important;color:var(--wb-ink)!important;
border:1px solid var(--wb-control)!important;border-radius:6px;font-size:13px}
.bk-btn:hover{background:var(--wb-raised)!important}
.bk-btn.bk-active{background:var(--wb-accent)!important;color:var(--wb-on-accent)!important;
border-color:var(--wb-accent)!important}
.bk-btn:focus-visible,.bk-input:focus-visible{outline:3px solid var(--wb-accent);outline-offset:1px}
.modebar-btn:focus-visible{outline:3px solid var(--wb-accent)!important}
:host(.card-title){text-align:left!important}:host(.card-title) h3{margin:0;text-align:left}
label{color:var(--wb-muted);font-size:var(--wb-small)}a{color:var(--wb-accent)}
"""
CARD_CSS = """
:host(.card){background:var(--wb-surface);border:1px solid var(--wb-line);border-radius:var(--wb-radius);
box-shadow:none;outline:none}
.card-header{background:transparent;color:var(--wb-ink);border:0;padding:9px 12px 3px;min-height:0}
.card-header:focus-visible{outline:3px solid var(--wb-accent)}
.card-title,.card-title *{font-size:var(--wb-lead);font-weight:600;text-align:left!important}
"""
FIGURE_CSS = """
:host{background:var(--wb-surface);border:1px solid var(--wb-line);border-radius:var(--wb-radius);overflow:auto hidden;
padding:4px 4px 2px}
"""
# of frames with a conversation, a graph or attention patterns; published pages do not set the variable
BORDER = "border:1px solid var(--wb-line,#d9dee5);border-radius:8px;box-sizing:border-box"
TOOL_CSS = """
.bk-btn{font-size:12px!important;padding:1px 8px!important;border-color:var(--wb-line)!important;
color:var(--wb-muted)!important;box-shadow:none!important}
.bk-btn:hover,.bk-btn:focus-visible{border-color:var(--wb-control)!important;color:var(--wb-ink)!important}
"""
# of alerts by kind; the second colours are for notebooks, where no page sets the variables
ALERT_CSS = """
:host(.alert){background:var(--wb-accent-soft,#dfeaf5);color:var(--wb-ink,#1f2430);border:0;border-radius:4px;
border-left:4px solid var(--wb-accent,#14508c);padding:8px 12px}
:host(.alert-warning){background:var(--wb-warn-soft,#fbf0d9);border-left-color:var(--wb-warn,#7a4f00)}
:host(.alert-danger){background:var(--wb-bad-soft,#fbe7e4);border-left-color:var(--wb-bad,#a82a1f)}
"""
# Twice the class: Tabulator's own style sheet comes later and would win
TABULATOR_CSS = """
.tabulator.tabulator{background:var(--wb-surface);color:var(--wb-ink);border:0;font-size:var(--wb-text)}
.tabulator.tabulator .tabulator-header,.tabulator.tabulator .tabulator-header .tabulator-col,
.tabulator.tabulator .tabulator-footer{background:var(--wb-surface);color:var(--wb-muted);border-color:var(--wb-line)}
.tabulator.tabulator .tabulator-header .tabulator-col .tabulator-col-content{background:var(--wb-surface)}
.tabulator.tabulator .tabulator-row,.tabulator.tabulator .tabulator-row.tabulator-row-even{
background:var(--wb-surface);color:var(--wb-ink);border-bottom:1px solid var(--wb-line)}
.tabulator.tabulator .tabulator-row:hover{background:var(--wb-raised)!important}
.tabulator.tabulator .tabulator-cell{border-color:transparent}
.tabulator.tabulator .tabulator-frozen{border-color:var(--wb-line)!important}
.tabulator.tabulator .tabulator-header .tabulator-col .tabulator-col-content .tabulator-col-title{white-space:normal;
overflow:visible}
.tabulator.tabulator input{background:var(--wb-surface);color:var(--wb-ink);border:1px solid var(--wb-control);
border-radius:4px}.tabulator.tabulator input::placeholder{color:var(--wb-muted);opacity:1}
.tabulator.tabulator .tabulator-footer .tabulator-page{background:var(--wb-surface);color:var(--wb-ink);
border:1px solid var(--wb-control);opacity:1}
.tabulator.tabulator .tabulator-footer .tabulator-page.active{color:var(--wb-accent);font-weight:700}
.tabulator.tabulator .tabulator-footer .tabulator-page[disabled]{color:var(--wb-muted)}
"""
_FRAME_CSS = """
*{box-sizing:border-box}
body{margin:0;font:var(--wb-text)/1.5 var(--wb-font);color:var(--wb-ink);background:var(--wb-page)}
.wb-skip{position:absolute;left:-999px}.wb-skip:focus{left:8px;top:8px;z-index:20;background:var(--wb-surface);padding:8px}
.wb-header{display:flex;align-items:center;gap:14px;height:48px;padding:0 16px;background:var(--wb-surface);
border-bottom:1px solid var(--wb-line);position:sticky;top:0;z-index:10}
.wb-brand{font-weight:700;color:var(--wb-ink);text-decoration:none;white-space:nowrap}
.wb-run{color:var(--wb-muted);overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.wb-header h1{font-size:var(--wb-text);font-weight:600;margin:0;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}.wb-run{min-width:0;flex-shrink:9}
.wb-header .wb-right{margin-left:auto;display:flex;align-items:center;gap:12px;flex:none;white-space:nowrap}
.wb-theme,.wb-menu{display:inline-flex;gap:6px;align-items:center;color:var(--wb-ink);background:transparent;
border:1px solid var(--wb-control);border-radius:6px;padding:3px 9px;font:inherit;font-size:13px;text-decoration:none;
cursor:pointer}
.wb-menu{display:none}.wb-busy{width:16px;height:16px;border:2px solid var(--wb-accent);border-top-color:transparent;
border-radius:50%;opacity:0;animation:wb-turn 1s linear infinite paused}@keyframes wb-turn{to{transform:rotate(1turn)}}
.wb-waits .wb-busy{opacity:1;animation-play-state:running;transition:opacity 0s .2s}
.wb-body{display:flex;align-items:stretch;min-height:calc(100vh - 48px)}
.wb-side{flex:0 0 256px;padding:10px 8px 30px;border-right:1px solid var(--wb-line);background:var(--wb-surface);
position:sticky;top:48px;height:calc(100vh - 48px);overflow-y:auto}
.wb-nav{display:block;margin-bottom:8px;padding-bottom:8px;border-bottom:1px solid var(--wb-line)}
.wb-nav h2{font-size:11px;font-weight:600;color:var(--wb-muted);margin:9px 10px 2px;line-height:1.4}
.wb-nav a{display:flex;align-items:center;gap:9px;padding:2px 10px;border-radius:6px;color:var(--wb-ink);
text-decoration:none}
.wb-nav a.wb-absent{color:var(--wb-muted)}.wb-nav a.wb-absent svg{opacity:.55}
.wb-nav summary{padding:2px 10px;color:var(--wb-muted);font-size:13px;margin-top:6px}
.wb-nav a:hover{background:var(--wb-raised)}
.wb-nav a[aria-current=page]{background:var(--wb-accent-soft);color:var(--wb-accent);font-weight:600}
.wb-nav svg{flex:none}
.wb-alone .wb-side,.wb-alone .wb-menu{display:none}.wb-alone .wb-main{margin:0 auto}
.wb-main{flex:1 1 0;min-width:0;padding:10px 16px 60px;max-width:1640px}
@media (max-width:1000px){.wb-menu{display:inline-flex}.wb-side{display:none;position:fixed;left:0;z-index:9}
.wb-side.open{display:block;box-shadow:0 0 0 100vmax #0006}}
@media (max-width:600px){.wb-header{gap:10px;padding:0 10px}.wb-menu+.wb-brand{display:none}.wb-alone .wb-brand{
display:block}.wb-main{padding:8px 4px 40px}}
@media print{.wb-header,.wb-side{display:none}body{background:#fff}}
"""
# sixteen-pixel drawings of lines, by page
_ICONS = {
    "overview": "M2 2h5v5H2zM9 2h5v5H9zM2 9h5v5H2zM9 9h5v5H9z",
    "experts": "M2 4h12M2 8h12M2 12h12M5 2v12M11 2v12",
    "sinks": "M2 3h12l-5 6v4l-2 1V9z",
    "sink-difference": "M2 3h12l-5 6v4l-2 1V9zM11 12h4",
    "channels": "M5 2v12M11 2v12M2 5h3M11 11h3",
    "effort": "M2 13V9M6 13V6M10 13V4M14 13V2",
    "transcript": "M2 3h12v8H7l-3 3v-3H2z",
    "live": "M4 3l9 5-9 5z",
    "compare": "M5 3 2 6l3 3M2 6h8M11 7l3 3-3 3M14 10H6",
    "causal": "M3 8h7M8 5l3 3-3 3M13 3v10",
    "graph": "M3 3h3v3H3zM10 10h3v3h-3zM10 2h3v3h-3zM6 5l4 6M6 4h4",
    "expert-examples": "M2 3h5v4H2zM2 10h5v4H2zM10 4h4M10 6h3M10 11h4M10 13h3",
    "label-probes": "M2 3h6l6 5-6 5H2zM5 8h.1",
    "router-prediction": "M2 8h4M6 8l5-4M6 8l5 4M11 4h3M11 12h3",
    "attention": "M1 8c2-4 4-5 7-5s5 1 7 5c-2 4-4 5-7 5s-5-1-7-5M8 6a2 2 0 1 0 .1 0",
    "neuron-examples": "M8 5a3 3 0 1 0 .1 0M8 1v4M8 11v4M1 8h4M11 8h4",
    "probe-trajectory": "M2 13c3 0 3-8 6-8s3 4 6-2M2 2v12h12",
    "features": "M8 1l2 5 5 .5-4 3.5 1.500 5L8 12l-4.500 3 1.500-5-4-3.500L6 6z",
    "": "M3 13V8M7 13V3M11 13V6M2 13h12",
}


class WorkbenchDesign(Native):
    """Panel's native design with the variables of this module."""

    modifiers: ClassVar[dict[Any, Any]] = {pn.viewable.Viewable: {"stylesheets": [Inherit, _COMPONENT_CSS]}}
    _themes: ClassVar[dict[str, Any]] = {"dark": DarkTheme, "default": DefaultTheme}


def variables(theme: ThemeName) -> str:
    """Return the style rule that sets every variable for a theme, and Panel's own from them."""
    own = {f"wb-{name}": value for name, value in (TOKENS[theme] | _SIZES).items()}
    panels = {
        "design-background-color": "surface",
        "design-background-text-color": "ink",
        "design-surface-color": "raised",
        "design-surface-text-color": "ink",
        "design-primary-color": "accent",
        "design-primary-text-color": "on-accent",
        "panel-border-color": "line",
        "panel-primary-color": "accent",
    }
    rules = own | {"wb-scheme": theme} | {name: f"var(--wb-{token})" for name, token in panels.items()}
    return f":root{{color-scheme:{theme};{''.join(f'--{name}:{value};' for name, value in rules.items())}}}"


def style(theme: ThemeName) -> str:
    """Return the style sheet of a page in a theme."""
    return variables(theme) + _FRAME_CSS + PARTS_CSS


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours written as #rrggbb, from 1 to 21.

    Reference: WCAG 2.2, definition of contrast ratio.
    """
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def icon(page: str) -> str:
    """Return the drawing of a page, as SVG that screen readers pass over."""
    path = _ICONS.get(page, _ICONS[""])
    return (
        '<svg width="16" height="16" viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.4" '
        f'stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><path d="{path}"/></svg>'
    )


def tile(value: str, label: str) -> str:
    """Return a large number with its label; both are escaped."""
    return f'<div class="wb-tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def note(text: str, kind: str = "") -> str:
    """Return a paragraph that stands out; kind: good, warning or danger. The text is escaped."""
    return f'<div class="wb-note {escape(kind)}">{escape(text)}</div>'
