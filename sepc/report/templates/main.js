// What the parts of the page do with each other.
const at = id => document.getElementById(id);

async function readData() {
  const bytes = Uint8Array.from(atob(at("data").textContent.trim()), letter => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(plain).text());
}

function run({graphs, regions}) {
  const details = new Details(at("details"), regions);
  const view = new GraphView(at("picture"), data => {
    if ("key" in data) details.node(data);
    else details.region(data, view.graph.nodes.filter(node => node.region === data.name));
  });
  let mode = "graph", hits = [], hit = -1;

  function showStep(index) {
    const graph = graphs[index];
    at("pass").value = index;
    const count = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;
    const fresh = [...graph.nodes, ...graph.regions].filter(one => one.mark === "new").length;
    const what = [[fresh, "new"], [graph.removed.length, "removed"]].filter(([number]) => number).map(one => one.join(" "));
    const sizes = [count(graph.nodes.length, "node"), count(graph.regions.length, "region"), ...what];
    at("pass-name").textContent = `${index ? "after " : ""}${graph.title}: ${sizes.join(", ")}`;
    at("pass").setAttribute("aria-valuetext", at("pass-name").textContent);
    at("pass-name").title = graph.removed.length ? `Removed: ${graph.removed.join(", ")}` : "";
    view.show(graph);
    if (mode !== "graph") showText();
    search();
  }

  function showText() {
    const graph = graphs[at("pass").value];
    const kinds = {"+": "added", "-": "gone", "@": "place"};
    const text = mode === "text" ? graph.text : graph.diff || "This is the graph as captured: there is nothing before it.";
    const rows = text.split("\n").map(line => {
      const row = element("span", {}, line + "\n");
      if (mode === "diff" && kinds[line[0]]) row.className = kinds[line[0]];
      return row;
    });
    at("text").replaceChildren(...rows);
  }

  function setMode(next) {
    mode = next;
    for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", button.dataset.view === mode);
    at("picture").style.display = mode === "graph" ? "" : "none";
    at("text").hidden = mode === "graph";
    if (mode !== "graph") showText();
  }

  function search() {
    hits = view.find(at("search").value);
    hit = -1;
    at("found").textContent = at("search").value.trim() ? `${hits.length} found${hits.length ? ", Enter: the next" : ""}` : "";
  }

  function nextHit(step) {
    if (!hits.length) return;
    setMode("graph");
    hits[hit]?.classList.remove("here");
    hit = (hit + step + hits.length) % hits.length;
    hits[hit].classList.add("here");
    view.reveal(hits[hit]);
    view.select(hits[hit]);
    at("found").textContent = `${hit + 1} of ${hits.length}`;
  }

  function showRegion(name) {
    setMode("graph");
    showStep(graphs.length - 1);
    const made = view.regionNamed(name);
    view.focus(view.regions.indexOf(made));
    view.select(made);
    at("graph").scrollIntoView();
  }

  at("pass").max = graphs.length - 1;
  at("pass").addEventListener("input", () => showStep(Number(at("pass").value)));
  at("search").addEventListener("input", search);
  at("search").addEventListener("keydown", event => { if (event.key === "Enter") nextHit(event.shiftKey ? -1 : 1); });
  at("zoom-in").addEventListener("click", () => view.zoomBy(STEP));
  at("zoom-out").addEventListener("click", () => view.zoomBy(1 / STEP));
  at("fit").addEventListener("click", () => view.fit());
  at("top").addEventListener("click", () => view.start());
  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => setMode(button.dataset.view));
  for (const button of document.querySelectorAll("[data-region]")) button.addEventListener("click", () => showRegion(button.dataset.region));
  at("picture").addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    const index = Number(at("pass").value) + (step ?? 0);
    if (!step || !graphs[index]) return;
    event.preventDefault();
    showStep(index);
    at("picture").focus({preventScroll: true});
  });
  document.addEventListener("keydown", event => {
    if (event.key !== "/" || event.target.matches("input, textarea")) return;
    event.preventDefault();
    at("search").focus();
  });

  at("graph").hidden = false;
  showStep(graphs.length - 1);
  view.start();
}

const data = await readData();
if (data.graphs.length) run(data);
document.documentElement.dataset.ready = "yes";
