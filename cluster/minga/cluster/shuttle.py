"""The example's data: real sensor readings of a space shuttle, dealt out to sites.

The set is UCI's Statlog (Shuttle) as the `river` package ships it (49,097 readings of 9 sensors,
7 % anomalies), so nothing is downloaded.
"""

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minga.cluster.errors import ProjectError

COLUMNS = ("f1", "f2", "f3", "f4", "f5", "f6", "f7", "f8", "f9", "anomaly")
NUM_TEST = 10_000
NUM_CENTRAL = 3_000

CONCENTRATION = 0.5
"""Of the Dirichlet draw: the smaller, the more sites differ in size and in their mix."""

MIN_ROWS = 100
MIN_ANOMALIES = 5
"""A site with fewer could learn nothing at all; the draw is repeated until no site has."""

MAX_DRAWS = 10_000


def write(directory: Path, *, seed: int, num_sites: int = 0) -> tuple[Path, ...]:
    """Write `test.csv`, `central.csv` and, for each site, `site-0.csv` and so on.

    No reading is in two files. The same seed gives the same files, and the test and central sets
    do not depend on the number of sites. What neither has, about 36,000 readings, is dealt out:
    for normal readings and for anomalies each site's share is drawn from a Dirichlet distribution
    (Hsu et al. 2019, arXiv:1909.06335), so sites differ in size and in their mix.

    Args:
        directory: is made if it is missing.
        seed: of the shuffle and of the draw.
        num_sites: how many sites to deal out to; 0 writes none.

    Returns:
        the files written, the test set first.

    Raises:
        ProjectError: `river` is not installed, or there are too many sites.
    """
    generator = np.random.default_rng(seed)
    readings = _read()
    readings = readings[generator.permutation(len(readings))]
    test, central, rest = np.split(readings, [NUM_TEST, NUM_TEST + NUM_CENTRAL])
    tables = {"test.csv": test, "central.csv": central}
    if num_sites:
        sites = _deal(rest, num_sites, generator)
        tables |= {f"site-{index}.csv": site for index, site in enumerate(sites)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        np.savetxt(
            directory / name, table, fmt="%g", delimiter=",", header=",".join(COLUMNS), comments=""
        )
    return tuple(directory / name for name in tables)


def _read() -> NDArray[np.float32]:
    # Found, not imported: importing river would load all of it to read one file.
    spec = importlib.util.find_spec("river")
    if spec is None or spec.origin is None:
        raise ProjectError(
            "the example's data comes with the package river, which is not installed; "
            "install it with: pip install 'minga[cluster]'"
        )
    file = Path(spec.origin).parent / "datasets" / "shuttle.csv.gz"
    readings: NDArray[np.float32] = np.loadtxt(file, np.float32, delimiter=",", skiprows=1)
    return readings


def _deal(
    readings: NDArray[np.float32], num_sites: int, generator: np.random.Generator
) -> list[NDArray[np.float32]]:
    """Deal readings, whose last column is the label, out to sites."""
    classes = [np.flatnonzero(readings[:, -1] == label) for label in (0, 1)]
    for _ in range(MAX_DRAWS):
        parts = [_cut(rows, num_sites, generator) for rows in classes]
        sites = list(zip(*parts, strict=True))
        if all(
            len(normal) + len(anomalies) >= MIN_ROWS and len(anomalies) >= MIN_ANOMALIES
            for normal, anomalies in sites
        ):
            return [readings[generator.permutation(np.concatenate(site))] for site in sites]
    raise ProjectError(
        f"{len(readings)} readings cannot be dealt out to {num_sites} sites so that each has "
        f"{MIN_ROWS}, {MIN_ANOMALIES} of them anomalies; ask for fewer sites"
    )


def _cut(
    rows: NDArray[np.intp], num_sites: int, generator: np.random.Generator
) -> list[NDArray[np.intp]]:
    """Cut rows into one part for each site, of sizes drawn from a Dirichlet distribution."""
    shares = generator.dirichlet([CONCENTRATION] * num_sites)
    ends = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
    return np.split(rows, ends)
