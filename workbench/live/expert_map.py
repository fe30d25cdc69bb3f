"""The map of layers by experts: loads of the tokens so far, the experts of the last token, and cells to choose."""

from collections.abc import Sequence
from typing import Any, ClassVar

import param
from panel.custom import JSComponent

from workbench.model.config import Config


def shares_by_cell(load: Sequence[Sequence[float]], cfg: Config) -> list[list[float | None]]:
    """Return the share of slots by layer and expert, with None for experts that a layer does not have."""
    return [
        [share if expert < cfg.experts_of(layer) else None for expert, share in enumerate(row)]
        for layer, row in enumerate(load)
    ]


class ExpertMap(JSComponent):
    """A grid of buttons, a row for each layer. Arrow keys move in it; a click or the space bar chooses a cell.

    load: of every layer, the share of slots of each expert, None for an expert that it does not have. active: the
    experts of the last token of each layer. chosen: pairs of layer and expert.
    """

    load = param.List(default=[])
    active = param.List(default=[])
    chosen = param.List(default=[])
    _esm = """
export function render({ model, el }) {
  const grid = document.createElement("div");
  grid.className = "map"; grid.setAttribute("role", "group"); grid.setAttribute("aria-label", "layers by experts");
  let cells = [];
  function draw() {
    const load = model.load, columns = load.length ? load[0].length : 0;
    grid.style.gridTemplateColumns = `max-content repeat(${columns}, minmax(9px, 1fr))`;
    grid.replaceChildren(); cells = [];
    const step = columns > 64 ? 16 : columns > 20 ? 4 : 1; // numbers of experts over the columns
    [...Array(columns + 1).keys()].forEach(i => {
      const label = document.createElement("span");
      label.className = "column"; label.setAttribute("aria-hidden", "true");
      label.textContent = i && (i - 1) % step === 0 ? i - 1 : ""; grid.append(label);
    });
    load.forEach((row, layer) => {
      const label = document.createElement("span");
      label.className = "label"; label.textContent = layer; grid.append(label);
      cells.push(row.map((_, expert) => {
        const cell = document.createElement("button");
        cell.type = "button"; cell.tabIndex = layer || expert ? -1 : 0;
        cell.onclick = () => toggle(layer, expert);
        cell.onkeydown = event => move(event, layer, expert);
        grid.append(cell); return cell;
      }));
    });
    fill();
  }
  function fill() {
    const active = new Set(model.active.flatMap((row, layer) => row.map(expert => `${layer}:${expert}`)));
    const chosen = new Set(model.chosen.map(pair => pair.join(":")));
    cells.forEach((row, layer) => row.forEach((cell, expert) => {
      const load = model.load[layer], own = load.filter(share => share !== null).length;
      const key = `${layer}:${expert}`, relative = (load[expert] || 0) * own;
      cell.style.visibility = load[expert] === null ? "hidden" : "visible";
      cell.style.setProperty("--share", `${Math.round(Math.min(relative / 4, 1) * 100)}%`);
      cell.classList.toggle("active", active.has(key));
      cell.classList.toggle("chosen", chosen.has(key));
      cell.setAttribute("aria-pressed", chosen.has(key));
      const text = `layer ${layer}, expert ${expert}: ${relative.toFixed(2)} × uniform`;
      cell.title = text; cell.setAttribute("aria-label", text);
    }));
  }
  function toggle(layer, expert) {
    const rest = model.chosen.filter(([l, e]) => l !== layer || e !== expert);
    model.chosen = rest.length < model.chosen.length ? rest : [...rest, [layer, expert]];
  }
  function move(event, layer, expert) {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    const next = step && cells[layer + step[0]] && cells[layer + step[0]][expert + step[1]];
    if (!next || next.style.visibility === "hidden") return;
    event.preventDefault(); cells[layer][expert].tabIndex = -1; next.tabIndex = 0; next.focus();
  }
  model.on("load", () => cells.length === model.load.length ? fill() : draw());
  model.on("active", fill); model.on("chosen", fill);
  draw();
  return grid;
}
"""
    _stylesheets: ClassVar[list[Any]] = [
        """
.map{display:grid;gap:2px;width:100%;box-sizing:border-box;padding:4px;overflow-x:auto}
.label{color:var(--wb-muted);font-size:var(--wb-small);padding-right:6px;text-align:right;line-height:22px}
.column{color:var(--wb-muted);font-size:11px;text-align:center;line-height:16px;height:16px;white-space:nowrap}
button{all:unset;box-sizing:border-box;height:22px;border-radius:3px;cursor:pointer;border:1px solid transparent;
background:color-mix(in srgb,var(--wb-accent) var(--share,0%),var(--wb-raised))}
button:hover{border-color:var(--wb-control)}
button:focus-visible{outline:3px solid var(--wb-accent);outline-offset:1px}
button.active{border:2px solid var(--wb-warn)}
button.chosen{border:2px solid var(--wb-bad);background-image:linear-gradient(45deg,transparent 44%,var(--wb-bad) 45%,
var(--wb-bad) 55%,transparent 56%)}
"""
    ]
