"use strict";
const find = selector => document.querySelector(selector);

// Sort: a header's button sorts by its column, largest first for figures; pressing again turns the order.
const body = find("tbody");
for (const button of document.querySelectorAll("thead button")) button.onclick = () => {
  const th = button.closest("th"), text = th.classList.contains("text");
  const first = text ? "ascending" : "descending", other = text ? "descending" : "ascending";
  const order = th.getAttribute("aria-sort") === first ? other : first;
  for (const cell of th.parentNode.children) cell.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const key = row => row.children[th.cellIndex].dataset.value ?? row.children[th.cellIndex].textContent;
  const words = new Intl.Collator(undefined, {numeric: true});
  const rows = [...body.rows].map(row => [key(row), row]);
  rows.sort((a, b) => sign * (text ? words.compare(a[0], b[0]) : a[0] - b[0]));
  body.append(...rows.map(pair => pair[1]));
};

// Filter: by name, and by whether blocks are zero.
const filter = () => {
  const words = find("#filter").value.toLowerCase(), changed = find("#changed").checked;
  let shown = 0;
  for (const row of body.rows) {
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(words) || changed && !row.dataset.changed;
    shown += !row.hidden;
  }
  find("#shown").textContent = `${shown} of ${body.rows.length} layers`;
};
find("#filter").oninput = find("#changed").onchange = filter;
filter();

// Light and dark: the system's choice until the button is pressed.
find("#theme").onclick = () => {
  const root = document.documentElement, now = root.style.colorScheme;
  const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
};

// Graph: `view` is the part that is seen, in the drawing's units; `scale` is pixels a unit.
const graph = find("#graph");
if (graph) {
  const whole = graph.viewBox.baseVal, all = {x: whole.x, y: whole.y, width: whole.width, height: whole.height};
  let x = all.x, y = all.y, scale = 1;
  const show = () => graph.setAttribute(
    "viewBox", `${x} ${y} ${graph.clientWidth / scale} ${graph.clientHeight / scale}`);
  const zoom = (factor, px = graph.clientWidth / 2, py = graph.clientHeight / 2) => {
    const next = Math.min(8, Math.max(0.005, scale * factor));
    x += px / scale - px / next;
    y += py / scale - py / next;
    scale = next;
    show();
  };
  const move = (dx, dy) => { x -= dx / scale; y -= dy / scale; show(); };
  const fit = () => {
    scale = Math.min(graph.clientWidth / all.width, graph.clientHeight / all.height);
    x = all.x - (graph.clientWidth / scale - all.width) / 2;
    y = all.y;
    show();
  };
  const start = () => {
    scale = Math.min(1, Math.max(graph.clientWidth / all.width, .6));
    x = all.x - Math.max(0, (graph.clientWidth / scale - all.width) / 2);
    y = all.y;
    show();
  };
  const at = event => [event.clientX - graph.getBoundingClientRect().x, event.clientY - graph.getBoundingClientRect().y];
  graph.onwheel = event => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 400), ...at(event)); };
  const fingers = new Map();
  let travel = 0;
  graph.onpointerdown = event => { fingers.set(event.pointerId, at(event)); if (fingers.size === 1) travel = 0; };
  const lift = event => { fingers.delete(event.pointerId); graph.classList.remove("moving"); };
  graph.onpointerup = graph.onpointercancel = lift;
  graph.onpointermove = event => {
    if (!fingers.has(event.pointerId)) return;
    const before = fingers.get(event.pointerId), now = at(event);
    travel += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (travel > 4 && !graph.hasPointerCapture(event.pointerId)) {
      graph.setPointerCapture(event.pointerId);
      graph.classList.add("moving");
    }
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const span = point => Math.hypot(point[0] - other[0], point[1] - other[1]);
      zoom(span(now) / Math.max(span(before), 1), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else move(now[0] - before[0], now[1] - before[1]);
    fingers.set(event.pointerId, now);
  };
  graph.addEventListener("click", event => { if (travel > 4) event.preventDefault(); }, true);
  graph.addEventListener("dragstart", event => event.preventDefault());
  const keys = {ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60),
    ArrowDown: () => move(0, -60), PageUp: () => move(0, graph.clientHeight * .8),
    PageDown: () => move(0, -graph.clientHeight * .8), "+": () => zoom(1.25), "=": () => zoom(1.25),
    "-": () => zoom(.8), "0": start, Home: start, f: fit};
  graph.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  };
  find("#larger").onclick = () => zoom(1.25);
  find("#smaller").onclick = () => zoom(.8);
  find("#fit").onclick = fit;
  find("#start").onclick = start;
  new ResizeObserver(show).observe(graph);
  start();
}

// Masks: a picture opens large, one square a block; arrow keys lead to the next layer's.
const dialog = find("dialog");
if (dialog) {
  const masks = () => [...document.querySelectorAll("tbody tr:not([hidden]) .mask")];
  let current = null;
  const open = button => {
    current = button;
    const image = button.firstElementChild, [rows, columns] = [image.naturalHeight, image.naturalWidth];
    find("dialog h2").textContent = button.dataset.name;
    find("#about").textContent = image.alt;
    const side = Math.min(innerWidth * .88 / columns, innerHeight * .68 / rows, 48);
    const step = side >= 1 ? Math.floor(side) : side, gap = step >= 5 ? 1 : 0, canvas = find("dialog canvas");
    canvas.width = Math.ceil(columns * step);
    canvas.height = Math.ceil(rows * step);
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, columns * step, rows * step);
    if (gap) {
      for (let i = 1; i < columns; i++) pen.clearRect(i * step - 1, 0, 1, canvas.height);
      for (let j = 1; j < rows; j++) pen.clearRect(0, j * step - 1, canvas.width, 1);
    }
    canvas.setAttribute("aria-label", image.alt);
    if (!dialog.open) dialog.showModal();
  };
  const turn = by => {
    const list = masks(), next = list[list.indexOf(current) + by];
    if (next) open(next);
  };
  for (const button of document.querySelectorAll(".mask")) button.onclick = () => open(button);
  find("#before").onclick = () => turn(-1);
  find("#after").onclick = () => turn(1);
  dialog.onkeydown = event => {
    if (event.key === "ArrowLeft" || event.key === "ArrowUp") turn(-1);
    else if (event.key === "ArrowRight" || event.key === "ArrowDown") turn(1);
    else return;
    event.preventDefault();
  };
  dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
  dialog.onclose = () => current.focus();
}
