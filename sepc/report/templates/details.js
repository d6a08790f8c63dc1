// What is known of a region or of an operator, beside the graph.
function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

class Details {
  constructor(pane, regions) {
    this.pane = pane;
    this.regions = regions;
    pane.append(element("p", {className: "quiet"}, "Choose a region or an operator to see what is known of it."));
  }

  region(drawn, nodes) {
    const known = this.regions[drawn.name];
    const parts = [element("h3", {}, drawn.name)];
    if (known) {
      parts.push(this.list(known.rows));
    } else {
      parts.push(...drawn.lines.slice(1).map(line => element("p", {}, line)),
        element("p", {className: "quiet"}, "It is a part of another region in the end."));
    }
    parts.push(element("h4", {}, "Operators"), element("ol", {}, ...nodes.map(node => this.operator(node))));
    if (known?.decisions.length) {
      const decisions = known.decisions.map(([taken, text]) => element("li", {className: taken ? "" : "quiet"}, text));
      parts.push(element("h4", {}, "Decisions (grey: not done)"), element("ul", {}, ...decisions));
    }
    if (known?.kernel) {
      const kernel = element("pre", {tabIndex: 0}, known.kernel);
      parts.push(element("details", {}, element("summary", {}, "Source of the kernel"), kernel));
    }
    this.pane.replaceChildren(...parts);
  }

  node(node) {
    const rows = [["name", node.name], ["made by", node.by]];
    if (node.region) rows.push(["region", node.region]);
    const parts = [element("h3", {}, node.lines[0]), ...node.lines.slice(1).map(line => element("p", {}, line))];
    this.pane.replaceChildren(...parts, this.list(rows), this.source(node));
  }

  operator(node) {
    const item = element("li", {}, node.lines.join(", "));
    if (node.source) item.append(element("br"), this.source(node));
    return item;
  }

  source(node) {
    if (!node.source) return element("span", {className: "quiet"}, "The line of the model is not known.");
    return element("a", {href: node.link, title: node.source}, element("code", {}, node.source.split("/").slice(-2).join("/")));
  }

  list(rows) {
    return element("dl", {}, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  }
}
