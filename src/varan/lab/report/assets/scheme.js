// The colour scheme: the system's, unless the reader chose the other one.
(() => {
  "use strict";
  const KEY = "varan-scheme";
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");

  // A page opened from a file may have no storage: the choice then lasts for the page.
  const recall = () => {
    try { return localStorage.getItem(KEY); } catch { return null; }
  };
  const remember = (scheme) => {
    try {
      if (scheme) localStorage.setItem(KEY, scheme); else localStorage.removeItem(KEY);
    } catch { /* nothing to remember it in */ }
  };
  const systems = () => (system.matches ? "dark" : "light");
  const apply = (scheme) => {
    if (scheme) root.dataset.scheme = scheme; else delete root.dataset.scheme;
  };

  const known = recall();
  apply(known === "dark" || known === "light" ? known : null);

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("scheme");
    const label = () => {
      const next = (root.dataset.scheme || systems()) === "dark" ? "light" : "dark";
      button.textContent = `Use ${next} colours`;
      return next;
    };
    button.hidden = false;
    label();
    system.addEventListener("change", label);
    button.addEventListener("click", () => {
      const next = label();
      // Choosing what the system has anyway means following it again.
      const choice = next === systems() ? null : next;
      apply(choice);
      remember(choice);
      label();
    });
  });
})();
