// The chosen group, and the gates as bars over experts and layers.

const SHOWN = 12;
const SVG = "http://www.w3.org/2000/svg";

export function showRoute(decision, section) {
  const gates = decision.gates || {};
  const names = Object.keys(gates).sort((one, other) => Math.abs(gates[other]) - Math.abs(gates[one]));
  const group = decision.group === null ? "" : `Instruction group ${decision.group}. `;
  section.querySelector("#group").textContent = group + said(decision, names);
  const rows = names.slice(0, SHOWN).map((name) => row(name, gates[name], decision.gates_by_layer[name]));
  section.querySelector("tbody").replaceChildren(...rows);
  section.querySelector("table").hidden = !rows.length;
  const left = names.length - rows.length;
  section.querySelector("#rest").textContent = left > 0 ? `${left} more experts have smaller weights.` : "";
  section.hidden = false;
}

function said(decision, names) {
  if (decision.mode === "base") return "No expert takes part.";
  if (decision.gates === null) return "Every layer makes weights of its own.";
  const how = decision.mode === "automatic" ? "The question and the picture chose" : "The request chose";
  return `${how} ${names.length === 1 ? "1 expert" : `${names.length} experts`}.`;
}

function row(name, mean, layers) {
  const cells = [cell("th", name), cell("td", mean.toFixed(2), "value"), cell("td", "", "mean"), cell("td", "")];
  cells[0].scope = "row";
  cells[2].append(meanBar(mean));
  cells[3].append(layerBars(name, layers));
  const found = document.createElement("tr");
  found.append(...cells);
  return found;
}

function cell(kind, text, style) {
  const found = document.createElement(kind);
  found.textContent = text;
  if (style) found.className = style;
  return found;
}

function meanBar(mean) {
  const svg = picture(100, 12);
  svg.append(bar("empty", 0, 0, 100, 12), bar("bar", 0, 0, 100 * part(mean), 12));
  return svg;
}

function layerBars(name, layers) {
  const width = 100 / layers.length;
  const svg = picture(100, 24);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${name}: ${layers.map((gate) => gate.toFixed(2)).join(", ")}`);
  layers.forEach((gate, layer) => {
    const height = 24 * part(gate);
    const column = bar("bar", layer * width, 24 - height, width * 0.8, height);
    const title = document.createElementNS(SVG, "title");
    title.textContent = `layer ${layer}: ${gate.toFixed(3)}`;
    column.append(title);
    svg.append(bar("empty", layer * width, 0, width * 0.8, 24), column);
  });
  return svg;
}

function part(gate) {
  return Math.min(1, Math.abs(gate));
}

function picture(width, height) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("height", String(height));
  return svg;
}

function bar(style, x, y, width, height) {
  const found = document.createElementNS(SVG, "rect");
  found.setAttribute("class", style);
  for (const [key, value] of Object.entries({ x, y, width, height })) found.setAttribute(key, String(value));
  return found;
}
