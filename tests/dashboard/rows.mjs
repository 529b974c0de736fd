// How long is it from what a user does to the new rows on the screen? Measured in the page, by its own clock.

/** Prepares a page for `untilRows`. */
export function readyToMeasure(page) {
  return page.evaluate(() => {
    const rows = () => [...document.querySelectorAll("tr[data-row]")];
    const drawn = {
      ids: (wanted) => rows().slice(0, wanted.length).map((row) => row.querySelector(".lnk.mono").title).join() === wanted.join(),
      row: (wanted) => rows().some((row) => Number(row.dataset.row) >= wanted),
    };
    window.awaitRows = (type, kind, wanted) => {
      window.tookMs = new Promise((then) => {
        addEventListener(type, (event) => {
          // A frame that has them is on the screen when the next one begins.
          const look = () => requestAnimationFrame(() => (drawn[kind](wanted) ? requestAnimationFrame(end) : look()));
          const end = () => then(performance.now() - event.timeStamp);
          look();
        }, { capture: true, once: true });
      });
    };
  });
}

/**
 * Acts, and says how many ms it took from the event of that type, which comes of the act, until the wanted rows were drawn:
 * the first `ids` of the table, or the `row` of that number.
 */
export async function untilRows(page, type, kind, wanted, act) {
  await page.evaluate(([a, b, c]) => window.awaitRows(a, b, c), [type, kind, wanted]);
  await act();
  const late = new Promise((_, fail) => setTimeout(() => fail(new Error(`no such rows: ${kind} ${wanted}`)), 5_000).unref());
  return Promise.race([page.evaluate(() => window.tookMs), late]);
}
