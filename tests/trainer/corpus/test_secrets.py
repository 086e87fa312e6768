"""A URL with a secret in it is refused before it is written anywhere."""

from __future__ import annotations

import pytest

from trainer.corpus.errors import CorpusError
from trainer.corpus.remote import refuse_secrets


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/wiki",
        "s3://AKIA123:hunter2@bucket/wiki",
        "https://host/wiki?X-Amz-Signature=hunter2",
        "https://host/wiki?sv=1&sig=hunter2",
        "gs://bucket/wiki?access_token=hunter2",
    ],
)
def test_it_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(CorpusError, match="in the environment") as caught:
        refuse_secrets(url, "data.corpus")
    assert "hunter2" not in str(caught.value)
    assert "data.corpus" in str(caught.value)


@pytest.mark.parametrize(
    "place", ["s3://bucket/wiki", "file:///data/a@b", "/data/x?sig=1", "hf://datasets/a/b@main/x"]
)
def test_other_places_are_not(place: str) -> None:
    refuse_secrets(place, "data.corpus")
