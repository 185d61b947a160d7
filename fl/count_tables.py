"""Class counts of published federations, as patterns for dividing any data set.

A row is a client, a column a class; the numbers are training images. What a pattern keeps is the
share of each class that each client has.

Sources: the splits released with FCA (Wicaksana et al. 2023, https://arxiv.org/abs/2305.00738):
haemorrhages of the RSNA set among ten and among five clients; Fed-ISIC2019 of FLamby (Ogier du
Terrail et al. 2022, https://arxiv.org/abs/2210.04620); and the four dermoscopic clients released
with PRR-Imbalance (Chen et al. 2022, https://doi.org/10.1109/TMI.2022.3192483).
"""

import numpy as np
from torch import Tensor

from sdq.errors import RequestError, nearest

TABLES: dict[str, tuple[tuple[int, ...], ...]] = {
    # epidural, intraparenchymal, intraventricular, subarachnoid, subdural
    "ich10": (
        (0, 0, 1112, 2245, 4033), (88, 5522, 0, 1926, 0), (89, 1122, 2339, 0, 7627),
        (0, 2430, 0, 3574, 2944), (132, 518, 0, 930, 1828), (269, 0, 0, 1034, 1834),
        (538, 928, 2662, 0, 0), (9, 502, 0, 0, 2869), (69, 62, 0, 1635, 957),
        (4, 62, 1017, 429, 1033),
    ),
    "ich5": (
        (165, 2109, 1200, 2373, 4454), (171, 2209, 1614, 2148, 4321), (594, 2474, 1447, 2220, 5557),
        (202, 2282, 1284, 2576, 4000), (66, 2071, 1586, 2456, 4793),
    ),
    # MEL, NV, BCC, AK, BKL, DF, VASC, SCC; the centres as in CENTRES below
    "isic2019": (
        (2279, 3363, 2245, 606, 923, 97, 87, 330), (20, 2977, 2, 0, 96, 23, 45, 0),
        (533, 1470, 174, 20, 379, 40, 64, 11), (276, 649, 223, 86, 406, 20, 3, 144),
        (166, 349, 0, 0, 140, 0, 0, 0), (58, 276, 5, 0, 6, 4, 2, 0),
    ),
    # nv, bkl, mel
    "dermoscopic4": ((1282, 333, 476), (2604, 87, 17), (562, 343, 239), (960, 178, 262)),
}  # fmt: skip

CENTRES = {
    "isic2019": ("BCN", "vidir_molemax", "vidir_modern", "rosendahl", "MSK4", "vienna_dias"),
    "dermoscopic4": ("vidir_modern", "vidir_molemax", "rosendahl", "msk"),
}


def shares(name: str, labels: Tensor) -> np.ndarray:
    """Return the share of each class that each client has, float64 ``(classes, clients)``.

    Where the data have as many classes as the table, they are the table's, in its order. Where
    not, they are matched by size: the data's largest class follows the table's largest, the next
    the next, and after the last again the first.

    Args:
        name: of the table.
        labels: int64 ``(N,)``, of the training images.

    Raises:
        RequestError: no such table.
    """
    if name not in TABLES:
        raise RequestError(f"--partition: unknown counts {name!r}; {nearest(name, TABLES)}")
    table = np.array(TABLES[name], np.float64)  # (clients, columns)
    counts = np.bincount(labels.numpy())
    columns = np.arange(len(counts))
    if len(counts) != table.shape[1]:
        by_size = np.argsort(-table.sum(0), kind="stable")
        rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
        columns = by_size[rank % table.shape[1]]
    chosen: np.ndarray = table[:, columns].T
    return chosen / chosen.sum(1, keepdims=True)
