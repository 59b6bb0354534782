// What scrolls sideways can be reached and scrolled with the keyboard.
window.addEventListener("load", () => {
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach((part) => part.setAttribute("tabindex", "0"));
});
