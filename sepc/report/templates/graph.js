// The graph after one pass: drawn from coordinates, moved, zoomed, searched.
const SVG = "http" + "://www.w3.org/2000/svg"; // A name, not an address.
const LINE_HEIGHT = 11.5, MOST_ZOOM = 6, LEAST_ZOOM = 0.05, STEP = 1.25;

function shape(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function lines(texts, x, top) {
  return texts.map((text, index) => {
    const line = shape("text", {x, y: top + (index + 0.8) * LINE_HEIGHT});
    line.textContent = text;
    return line;
  });
}

class GraphView {
  constructor(svg, choose) {
    this.svg = svg;
    this.choose = choose; // Called with a region's or a node's element and data.
    this.scene = shape("g");
    const tip = shape("path", {d: "M0,0L6,3L0,6z"});
    const arrow = {id: "arrow", viewBox: "0 0 6 6", refX: 5, refY: 3, markerWidth: 6, markerHeight: 6, orient: "auto"};
    svg.append(shape("defs", {}, shape("marker", arrow, tip)), this.scene);
    this.zoom = 1;
    this.x = this.y = 0;
    this.listen();
  }

  show(graph) {
    if (this.graph) { // What was in sight is about where it was.
      this.x += (this.graph.width - graph.width) * this.zoom / 2;
      this.y *= graph.height / this.graph.height;
      this.place();
    }
    this.graph = graph;
    this.regions = graph.regions.map((region, index) => this.region(region, index));
    const edges = graph.edges.map(d => shape("path", {class: "edge", d, "marker-end": "url(#arrow)"}));
    this.nodes = graph.nodes.map(node => this.node(node));
    this.scene.replaceChildren(...this.regions, ...edges, ...this.nodes);
  }

  region(region, index) {
    const {x, y, width, height} = region;
    const made = shape("g", {
      class: `region c-${region.colour || "other"} ${region.mark ? `marked m-${region.mark}` : ""}`,
      tabindex: index ? -1 : 0, role: "button", "aria-label": region.lines.join(", "), "data-name": region.name,
    }, shape("rect", {x, y, width, height, rx: 6}), ...lines(region.lines, x + 6, y + 4));
    return this.listening(made, region);
  }

  node(node) {
    const {width, height} = node, x = node.x - width / 2, y = node.y - height / 2;
    const top = node.y - node.lines.length * LINE_HEIGHT / 2;
    const round = node.role === "input" || node.role === "output" ? height / 2 : 5;
    const made = shape("g", {
      class: `node ${node.role} ${node.mark ? `marked m-${node.mark}` : ""}`, "data-key": node.key,
    }, shape("rect", {x, y, width, height, rx: round}), ...lines(node.lines, node.x, top));
    return this.listening(made, node);
  }

  listening(made, data) {
    made.data = data;
    made.addEventListener("click", event => {
      event.stopPropagation();
      if (!this.dragged) this.select(made);
    });
    return made;
  }

  select(made) {
    for (const other of this.scene.querySelectorAll(".selected")) other.classList.remove("selected");
    made.classList.add("selected");
    this.choose(made.data);
  }

  regionNamed(name) {
    return this.regions.find(made => made.data.name === name);
  }

  // Search: marks what has all the words, and returns it, in order.
  find(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const text = ({data}) => [...data.lines, data.name, data.source ?? "", data.region ?? ""].join(" ").toLowerCase();
    const hits = wanted.length ? [...this.regions, ...this.nodes].filter(made => wanted.every(word => text(made).includes(word))) : [];
    this.svg.classList.toggle("searching", wanted.length > 0);
    for (const made of this.scene.children) made.classList.remove("hit", "here");
    for (const made of hits) made.classList.add("hit");
    return hits.sort((a, b) => a.data.y - b.data.y);
  }

  // Moving and zooming: scene coordinates times zoom, plus (x, y).
  place() {
    this.scene.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.zoom})`);
  }

  zoomBy(factor, at = {x: this.svg.clientWidth / 2, y: this.svg.clientHeight / 2}) {
    const zoom = Math.min(MOST_ZOOM, Math.max(LEAST_ZOOM, this.zoom * factor));
    this.x = at.x - (at.x - this.x) * zoom / this.zoom;
    this.y = at.y - (at.y - this.y) * zoom / this.zoom;
    this.zoom = zoom;
    this.place();
  }

  moveBy(x, y) {
    this.x += x;
    this.y += y;
    this.place();
  }

  fit() {
    const {clientWidth, clientHeight} = this.svg;
    this.zoom = Math.min(clientWidth / this.graph.width, clientHeight / this.graph.height, MOST_ZOOM);
    this.x = (clientWidth - this.graph.width * this.zoom) / 2;
    this.y = 0;
    this.place();
  }

  start() {
    this.zoom = Math.min(1.25, this.svg.clientWidth / this.graph.width);
    this.x = (this.svg.clientWidth - this.graph.width * this.zoom) / 2;
    this.y = 0;
    this.place();
  }

  // Brings something into the middle if it is out of sight, or too small to be read.
  reveal(made) {
    const {x, y, width, height} = made.querySelector("rect").getBBox();
    const {clientWidth, clientHeight} = this.svg;
    this.zoom = Math.max(this.zoom, 0.8);
    const left = x * this.zoom + this.x, top = y * this.zoom + this.y;
    if (left < 0 || left + width * this.zoom > clientWidth) this.x = clientWidth / 2 - (x + width / 2) * this.zoom;
    if (top < 0 || top + Math.min(height * this.zoom, clientHeight) > clientHeight) this.y = clientHeight / 4 - y * this.zoom;
    this.place();
  }

  listen() {
    this.svg.addEventListener("wheel", event => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) this.zoomBy(Math.exp(-event.deltaY / 300), {x: event.offsetX, y: event.offsetY});
      else this.moveBy(event.shiftKey ? -event.deltaY : -event.deltaX, event.shiftKey ? 0 : -event.deltaY);
    }, {passive: false});
    this.svg.addEventListener("pointerdown", event => {
      this.from = {x: event.clientX, y: event.clientY};
      this.dragged = false;
    });
    this.svg.addEventListener("pointermove", event => {
      if (!this.from || !event.buttons) return;
      const x = event.clientX - this.from.x, y = event.clientY - this.from.y;
      if (!this.dragged && Math.hypot(x, y) < 4) return;
      this.dragged = true;
      this.from = {x: event.clientX, y: event.clientY};
      this.moveBy(x, y);
    });
    this.svg.addEventListener("pointerup", () => { this.from = null; });
    this.svg.addEventListener("keydown", event => this.key(event));
  }

  key(event) {
    const at = this.regions.indexOf(document.activeElement);
    const moves = {ArrowDown: 1, ArrowUp: -1};
    if (event.key in moves) this.focus(Math.min(this.regions.length - 1, Math.max(0, at + moves[event.key])));
    else if (event.key === "Enter" || event.key === " ") { if (at >= 0) this.select(this.regions[at]); }
    else if (event.key === "+" || event.key === "=") this.zoomBy(STEP);
    else if (event.key === "-") this.zoomBy(1 / STEP);
    else return;
    event.preventDefault();
  }

  focus(index) {
    const made = this.regions[index];
    if (!made) return;
    for (const other of this.regions) other.setAttribute("tabindex", other === made ? 0 : -1);
    made.focus({preventScroll: true});
    this.reveal(made);
  }
}
