// Runs before the page is drawn, so that a kept theme never flashes the other one.
{
  let kept = null;
  try {
    kept = localStorage.getItem("cerebrum.theme");
  } catch {
    // storage is switched off: the system's theme it is
  }
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
}
