"""Cards of published data sets: content, download and layout."""

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
