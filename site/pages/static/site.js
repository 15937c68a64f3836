// A formula that is wider than its column is scrolled by the arrow keys, too (WCAG 2.1.1).
function reachable() {
  for (const formula of document.querySelectorAll("mjx-container[display]")) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
  }
}

addEventListener("load", () => window.MathJax?.startup?.promise.then(reachable));
addEventListener("resize", reachable);
