"""Cards of published data sets: what is in them, where to get them, how they are read and checked."""

from fedsigma.common.data.catalog.card import (
    Archive,
    CardError,
    DatasetCard,
    Images,
    Layout,
    Protocol,
    Protocols,
    card,
    card_text,
    cards,
    prompt_of,
    same_name,
)

__all__ = [
    "Archive",
    "CardError",
    "DatasetCard",
    "Images",
    "Layout",
    "Protocol",
    "Protocols",
    "card",
    "card_text",
    "cards",
    "prompt_of",
    "same_name",
]
