// Sort the table by its headers, filter it by text, and build a card per subnetwork when it is first shown. All texts
// are set as text, never as markup. Without this script the page lacks only the cards.
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, name, ...children) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children);
    return element;
  };

  // --- the table
  const table = byId("subnetworks");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const isText = headers.map((header) => header.classList.contains("text"));
  const valueOf = (cell, i) => {
    if (isText[i]) return [...cell.children].map((child) => child.textContent).join(" ") || cell.textContent.trim();
    return Number(cell.dataset.value ?? cell.textContent);
  };
  const rows = [...body.rows].map((row) => {
    const values = [...row.cells].map(valueOf);
    const words = `${row.classList.contains("dead") ? "dead" : "alive"} ${values.filter((_, i) => isText[i]).join(" ")}`;
    return { row, index: values[0], words: words.toLowerCase(), values };
  });
  const show = () => {
    const fragment = document.createDocumentFragment();
    for (const { row } of rows) fragment.append(row);
    body.append(fragment);
  };

  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const order = before ? (before === "ascending" ? "descending" : "ascending") : (button.dataset.first ?? "ascending");
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort(({ values: a, index: i }, { values: b, index: j }) => {
        const difference = isText[column] ? a[column].localeCompare(b[column]) : a[column] - b[column];
        return sign * difference || i - j;
      });
      show();
      cards?.restart();
    });
  });

  const filter = byId("filter");
  const shown = byId("shown");
  const apply = () => {
    const terms = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { row, index, words } of rows) {
      const hit = terms.every((term) => (/^\d+$/.test(term) ? String(index).startsWith(term) : words.includes(term)));
      row.hidden = !hit;
      count += hit;
    }
    shown.textContent = `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };

  // --- the cards
  const source = byId("described");
  const cards = source ? makeCards(JSON.parse(source.textContent)) : null;

  function makeCards(described) {
    const { kind, entries: named, tensors, subnetworks, tokens = {}, classes = {} } = described;
    const AT_ONCE = 12;
    const place = byId("cards");
    const more = byId("more-cards");
    const made = new Map();
    const prefix = commonPrefix(tensors);
    let order = [];
    let from = 0;
    let to = 0;

    const signs = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
    const number = (value) => {
      const size = Math.abs(value);
      return (size && (size < 1e-3 || size >= 1e4) ? value.toExponential(1) : value.toPrecision(3)).replace("-", "−");
    };
    const nameOf = (entry) => {
      if (named !== "tokens") return classes[entry] ?? `output ${entry}`;
      const text = signs(tokens[entry] ?? `#${entry}`);
      return text.startsWith(" ") ? `·${text.slice(1)}` : text;
    };
    for (const [i, seen] of subnetworks.entries()) {  // the filter also searches the cards' texts
      const texts = kind === "text" ? seen.top.map((top) => top.tokens.map((token) => tokens[token]).join("")) : [];
      const entries = [...seen.raised, ...seen.lowered].map(([entry]) => nameOf(entry));
      const row = rows[i];  // rows are not sorted yet
      row.words += ` ${[...texts, ...entries].join(" ").toLowerCase()}`;
      const link = make("a", "", String(i));
      link.href = `#card-${i}`;
      row.row.cells[0].replaceChildren(link);
    }

    function commonPrefix(names) {
      const parts = names.map((name) => name.split(".").slice(0, -1));
      let same = 0;
      while (parts.every((each) => each.length > same && each[same] === parts[0][same])) same += 1;
      return same ? `${parts[0].slice(0, same).join(".")}.` : "";
    }

    function moves(seen, n) {
      const side = (label, name, entries) => {
        const list = make("ol", "");
        for (const [entry, value] of entries.slice(0, n)) {
          list.append(make("li", "", make("span", "token", nameOf(entry)), make("data", "", number(value))));
        }
        return make("div", name, make("h4", "", label), entries.length ? list : make("p", "note", "nothing"));
      };
      return make("div", "moves", side("raises", "up", seen.raised), side("lowers", "down", seen.lowered));
    }

    function text(top) {
      const line = make("p", "context");
      if (top.first > 0) line.append("… ");
      top.tokens.forEach((token, i) => {
        const marked = i + top.first === top.position;
        const span = make(marked ? "mark" : "span", "", signs(tokens[token] ?? `#${token}`));
        const share = top.shares ? top.shares[i] : marked ? 100 : 0;
        if (share > 2) span.style.setProperty("--share", share);
        line.append(span);
      });
      const item = make("li", "", line, make("data", "", number(top.impact)));
      if (top.raised) {
        const aside = make("p", "aside");
        for (const [sign, name, entries] of [["↑", "up", top.raised], ["↓", "down", top.lowered]]) {
          if (entries.length) aside.append(make("span", name, sign));
          for (const [entry] of entries) aside.append(make("span", "token", nameOf(entry)));
        }
        item.append(aside);
      }
      return item;
    }

    function picture(top) {
      const image = make("img", "");
      image.src = `data:image/png;base64,${described.rows[top.row].png}`;
      image.alt = `row ${described.rows[top.row].number}`;
      const label = top.predicted === undefined ? "" : nameOf(top.predicted);
      return make("li", "", image, make("span", "token", label), make("data", "", number(top.impact)));
    }

    function point(top) {
      const values = described.rows[top.row].point;
      const largest = Math.max(...values.map(Math.abs), 1e-12);
      const bars = make("div", "bars");
      bars.setAttribute("role", "img");
      bars.setAttribute("aria-label", `inputs ${values.join(", ")}`);
      values.forEach((value, i) => {
        const bar = make("span", value < 0 ? "negative" : "");
        bar.style.setProperty("--height", Math.abs(value) / largest);
        bar.title = `input ${i}: ${value}`;
        bars.append(bar);
      });
      return make("li", "", bars, make("data", "", number(top.impact)));
    }

    function weights(norms) {
      const squares = norms.map((norm) => norm * norm);
      const total = squares.reduce((a, b) => a + b, 0) || 1;
      const strip = make("div", "strip");
      strip.setAttribute("aria-hidden", "true");
      squares.forEach((square, i) => {
        const cell = make("span", "");
        cell.style.setProperty("--share", (100 * Math.sqrt(square / total)).toFixed(1));
        cell.title = `${tensors[i]}: ${((100 * square) / total).toFixed(1)} %`;
        strip.append(cell);
      });
      const largest = squares.map((square, i) => [square / total, i]).sort(([a], [b]) => b - a).slice(0, 3);
      const named = largest.filter(([share]) => share >= 0.05).map(([share, i]) =>
        `${tensors[i].slice(prefix.length)} ${Math.round(100 * share)} %`);
      return make("div", "weights", make("h4", "", "weight"), strip, make("p", "note", named.join(" · ")));
    }

    function card(index) {
      if (made.has(index)) return made.get(index);
      const seen = subnetworks[index];
      const title = make("h3", "", make("a", "", `${index}`));
      title.firstChild.href = `#card-${index}`;
      title.firstChild.setAttribute("aria-label", `Subnetwork ${index}`);
      const facts = make("dl", "facts");
      const fact = (label, value) => facts.append(make("div", "", make("dt", "", label), make("dd", "", value)));
      if (seen.activation_rate !== null) {
        fact("kept for", seen.activation_rate ? `${number(100 * seen.activation_rate)} %` : "nothing: dead");
      }
      fact("mean impact", number(seen.impact));
      if (seen.intervention_ratio != null) fact("intervention ratio", number(seen.intervention_ratio));
      const item = { text, image: picture, point }[kind];
      const list = item ? make("ol", `top ${kind}`, ...seen.top.map(item)) : make("p", "note", "Rows of this kind cannot be displayed.");
      const diagram = document.querySelector(`#subnetwork-${index} > div`);
      const side = make("div", "side", moves(seen, 6), weights(seen.norms));
      if (diagram) {
        const copy = diagram.cloneNode(true);
        copy.querySelectorAll("[id]").forEach((element) => element.removeAttribute("id"));
        copy.querySelectorAll("[clip-path]").forEach((element) => element.removeAttribute("clip-path"));
        copy.classList.add("diagram");
        side.prepend(copy);
      }
      const article = make("article", "card", make("header", "", title, facts), list, side);
      article.id = `card-${index}`;
      article.tabIndex = -1;
      article.setAttribute("aria-label", `Subnetwork ${index}`);
      made.set(index, article);
      return article;
    }

    function draw() {
      place.replaceChildren(...order.slice(from, to).map(card));
      const remaining = order.length - to;
      more.hidden = remaining <= 0;
      more.textContent = `Show ${Math.min(AT_ONCE, remaining)} more of ${remaining.toLocaleString("en")}`;
    }

    function restart() {
      order = rows.filter(({ row }) => !row.hidden).map(({ index }) => index);
      [from, to] = [0, Math.min(AT_ONCE, order.length)];
      draw();
    }

    function open() {
      const index = Number((/^#card-(\d+)$/.exec(location.hash) ?? [])[1] ?? NaN);
      if (!(index in subnetworks)) return;
      if (!order.includes(index)) {
        filter.value = "";
        apply();
        restart();
      }
      const at = order.indexOf(index);
      if (at < from || at >= to) [from, to] = [at, Math.min(at + AT_ONCE, order.length)];
      draw();
      place.querySelectorAll(".card.open").forEach((other) => other.classList.remove("open"));
      const article = card(index);
      article.classList.add("open");
      article.scrollIntoView();
      article.focus({ preventScroll: true });
    }

    more.addEventListener("click", () => {
      const first = order[to];
      to = Math.min(to + AT_ONCE, order.length);
      draw();
      card(first).focus({ preventScroll: true });
    });
    addEventListener("hashchange", open);
    body.addEventListener("click", ({ target }) => {  // a link to the open card does not change the hash
      if (target.hash && target.hash === location.hash) open();
    });
    return { restart, open };
  }

  filter.addEventListener("input", () => {
    apply();
    cards?.restart();
  });
  document.querySelectorAll(".controls").forEach((control) => (control.hidden = false));
  apply();
  cards?.restart();
  cards?.open();
})();
