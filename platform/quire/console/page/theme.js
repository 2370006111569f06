// Sets the colours before anything is drawn: what was chosen here before, else what the system prefers.
(() => {
  const kept = (() => {
    try { return localStorage.getItem("quire.theme"); } catch { return null; }
  })();
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
