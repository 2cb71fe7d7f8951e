// Shows the definition of a term or symbol beside its link, on hover, focus or a first touch. Escape closes it.
(() => {
  const tip = Object.assign(document.createElement("div"), { id: "ewc-definition", role: "tooltip", hidden: true });
  let shown = null;
  let timer = 0;

  const about = (link) => {
    const anchor = link.hash ? decodeURIComponent(link.hash.slice(1)) : "";
    return anchor ? document.getElementById(`about-${anchor}`) : null;
  };

  const hide = () => {
    clearTimeout(timer);
    tip.hidden = true;
    if (shown) shown.removeAttribute("aria-describedby");
    shown = null;
  };

  const show = (link) => {
    clearTimeout(timer);
    if (shown === link) return;
    hide();
    tip.replaceChildren(about(link).content.cloneNode(true));
    // The link itself leads on; a link inside of what vanishes could not be reached with the keyboard.
    tip.querySelectorAll("a").forEach((inner) => inner.replaceWith(...inner.childNodes));
    tip.querySelectorAll("[tabindex]").forEach((inner) => inner.removeAttribute("tabindex"));
    tip.hidden = false;
    shown = link;
    link.setAttribute("aria-describedby", tip.id);
    const box = link.getClientRects()[0];
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8));
    const fits = box.bottom + tip.offsetHeight + 4 < window.innerHeight || box.top < tip.offsetHeight + 4;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${window.scrollY + (fits ? box.bottom + 4 : box.top - tip.offsetHeight - 4)}px`;
  };

  const start = () => {
    document.body.append(tip);
    document.querySelectorAll("article a[href*='#term-'], article a[href*='#sym-']").forEach((link) => {
      if (!about(link)) return;
      let touched = false;
      link.addEventListener("pointerenter", (event) => {
        if (event.pointerType !== "touch") timer = setTimeout(show, 150, link);
      });
      link.addEventListener("pointerleave", () => {
        clearTimeout(timer);
        timer = setTimeout(() => { if (document.activeElement !== shown) hide(); }, 200);
      });
      link.addEventListener("pointerdown", (event) => { touched = event.pointerType === "touch" && shown !== link; });
      link.addEventListener("focus", () => show(link));
      link.addEventListener("blur", hide);
      link.addEventListener("click", (event) => {
        if (!touched) return;
        touched = false;
        event.preventDefault();
        show(link);
      });
    });
    // The theme gives the keyboard only what is too wide when the page opens, which nothing folded is.
    document.querySelectorAll("details.starter").forEach((box) => box.addEventListener("toggle", () => {
      box.querySelectorAll("pre").forEach((code) => { if (code.scrollWidth > code.clientWidth) code.tabIndex = 0; });
    }));
    tip.addEventListener("pointerenter", () => clearTimeout(timer));
    tip.addEventListener("pointerleave", () => { if (document.activeElement !== shown) hide(); });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    document.addEventListener("pointerdown", (event) => {
      if (shown && !tip.contains(event.target) && !shown.contains(event.target)) hide();
    });
  };

  // What comes near is laid out only then, and may push what has just got the focus off the screen: bring it back.
  document.addEventListener("focusin", ({ target }) => {
    const settled = () => { if (target.matches(":focus-visible")) target.scrollIntoView({ block: "nearest" }); };
    requestAnimationFrame(() => requestAnimationFrame(settled));
  });

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
