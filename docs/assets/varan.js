// Wide tables scroll; the keyboard must reach them, too. The theme has wrapped them by now.
document$.subscribe(() => {
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap")) {
    wide.tabIndex = 0
  }
})
