"""The catalogue of networks: the two papers' and ours.

- ``catalogue``: declare, list, describe and create networks by name
- ``ssn3d``: the segmenters of Liu et al. 2018
- ``dsrf3d``: the teacher of Che et al. 2017 and the students of Guo et al. 2018
- ``rb3d``, ``cb3d``: the other two classifiers of Che et al. 2017
- ``ours``: a strided classifier and a strided segmenter
- ``blocks``: the layers that several families share
"""

from __future__ import annotations

from cectflow.networks import cb3d, dsrf3d, ours, rb3d, ssn3d
from cectflow.networks.catalogue import (
    NetworkInfo,
    create_network,
    list_networks,
    network_info,
)

__all__ = [
    "NetworkInfo",
    "cb3d",
    "create_network",
    "dsrf3d",
    "list_networks",
    "network_info",
    "ours",
    "rb3d",
    "ssn3d",
]
