"""People as a reward: a page shows the two images of a pair, and a click is a preference.

    rollout --pairs--> Booth <--Round-- page: left, right, neither --votes.jsonl--> preferences --> training

It needs an extra: `pip install 'lightning-fdfo[remote]'`.
"""

from lightning_fdfo.people.people import People

__all__ = ["People"]
