"""The rules of epochs: what follows the live one, who waits, and who holds what."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memory_server.errors import EpochInUse, EpochNotSealed, RefreshFailed, UnknownEpoch
from memory_server.shard.epochs import EpochBook, EpochPlan, Receipt


def receipt(plan: EpochPlan) -> Receipt:
    return Receipt(
        epoch=plan.epoch,
        shard=0,
        encoder_step=plan.encoder_step,
        content_version=plan.content_version,
        rows=1,
        live_rows=1,
        key_width=2,
        key_checksum=0,
        layout=0,
        encoded_rows=1,
        bytes={},
        seconds=0.0,
    )


def begin(book: EpochBook, *, weights: bool, content: str | None, step: int = 0) -> EpochPlan:
    return book.begin(encoder_step=step, new_weights=weights, content_version=content)


def live_book() -> EpochBook:
    book = EpochBook()
    plan = begin(book, weights=True, content="a", step=1)
    book.seal([receipt(plan)])
    book.activate(plan.epoch)
    return book


def sealed(book: EpochBook, *, weights: bool, content: str | None, step: int = 0) -> EpochPlan:
    plan = begin(book, weights=weights, content=content, step=step)
    book.seal([receipt(plan)])
    return plan


def test_an_edit_that_goes_live_during_a_refresh_is_not_undone_by_it() -> None:
    book = live_book()
    refresh = begin(book, weights=True, content=None, step=9)
    edit = sealed(book, weights=False, content="b", step=1)
    assert book.rebase(edit.epoch) is None
    book.activate(edit.epoch)
    book.seal([receipt(refresh)])
    rebased = book.rebase(refresh.epoch)
    assert rebased is not None
    assert (rebased.content_version, rebased.weights_id) == ("b", refresh.weights_id)
    assert rebased.encoder_step == 9
    book.seal([receipt(rebased)])
    assert book.rebase(rebased.epoch) is None


def test_a_refresh_that_goes_live_during_an_edit_is_not_undone_by_it() -> None:
    book = live_book()
    edit = sealed(book, weights=False, content="b", step=1)
    refresh = sealed(book, weights=True, content=None, step=9)
    book.activate(refresh.epoch)
    rebased = book.rebase(edit.epoch)
    assert rebased is not None
    assert (rebased.content_version, rebased.weights_id) == ("b", refresh.weights_id)
    assert rebased.encoder_step == 9


def test_what_was_given_explicitly_is_kept() -> None:
    book = live_book()
    both = sealed(book, weights=True, content="a", step=5)
    other = sealed(book, weights=True, content="c", step=6)
    book.activate(other.epoch)
    assert book.rebase(both.epoch) is None


def test_at_most_one_refresh_waits_behind_another() -> None:
    book = live_book()
    running = begin(book, weights=True, content=None, step=2)
    waiting = begin(book, weights=True, content=None, step=3)
    assert book.supersede(waiting) == []
    edit = begin(book, weights=False, content="b")
    assert book.supersede(edit) == []
    newest = begin(book, weights=True, content=None, step=4)
    assert book.supersede(newest) == [waiting.epoch]
    assert book.unsettled() == [running.epoch, edit.epoch, newest.epoch]
    with pytest.raises(RefreshFailed, match=f"superseded by epoch {newest.epoch}"):
        book.activate(waiting.epoch)


def test_a_pinned_epoch_outlives_its_release_until_the_pin_or_its_lease_ends() -> None:
    book = live_book()
    first = book.live
    assert first is not None
    one, two = book.pin(None, 10.0, now=0.0), book.pin(first, 20.0, now=0.0)
    book.activate(sealed(book, weights=True, content=None).epoch)
    assert not book.release(first, now=1.0)
    assert book.plan(first).epoch == first
    book.unpin(one.id)
    book.unpin(one.id)
    assert book.forget_left(5.0) == []
    book.renew(two.id, 20.0, now=15.0)
    assert book.forget_left(30.0) == []
    assert book.forget_left(35.5) == [first]
    with pytest.raises(UnknownEpoch, match=f"does not hold epoch {first}"):
        book.plan(first)
    with pytest.raises(UnknownEpoch, match="lease has ended"):
        book.renew(two.id, 5.0, now=36.0)


def test_pins_that_make_no_sense_are_refused() -> None:
    book = EpochBook()
    with pytest.raises(EpochNotSealed, match="no epoch is live"):
        book.pin(None, 1.0, now=0.0)
    book = live_book()
    staged = begin(book, weights=True, content=None)
    with pytest.raises(EpochNotSealed):
        book.pin(staged.epoch, 1.0, now=0.0)
    with pytest.raises(ValueError, match="lease_s"):
        book.pin(None, 0.0, now=0.0)
    with pytest.raises(UnknownEpoch):
        book.pin(77, 1.0, now=0.0)


class AnyHistory(RuleBasedStateMachine):
    """Random calls in any order: what answers and what is read is always sealed and held."""

    def __init__(self) -> None:
        super().__init__()
        self.book, self.now = live_book(), 0.0
        self.readers: dict[int, tuple[int, float]] = {}

    @rule(weights=st.booleans(), content=st.sampled_from([None, "a", "b"]))
    def stage(self, weights: bool, content: str | None) -> None:
        self.book.supersede(begin(self.book, weights=weights, content=content))

    @precondition(lambda self: self.book.unsettled())
    @rule(fails=st.booleans())
    def settle(self, fails: bool) -> None:
        plan = self.book.plans[self.book.unsettled()[0]]
        if fails:
            self.book.fail(plan.epoch, "because")
        else:
            self.book.seal([receipt(plan)])

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.book.receipts)))
        rebased = self.book.rebase(epoch)
        if rebased is not None:
            self.book.seal([receipt(rebased)])
            epoch = rebased.epoch
        before = self.book.plans[self.book.live]
        self.book.activate(epoch)
        plan = self.book.plans[epoch]
        if not plan.own_content:
            assert plan.content_version == before.content_version
        if not plan.own_weights:
            assert plan.weights_id == before.weights_id

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.book.plans)))
        if epoch == self.book.live:
            with pytest.raises(EpochInUse):
                self.book.release(epoch, self.now)
            return
        gone = self.book.release(epoch, self.now)
        read = any(e == epoch and until > self.now for e, until in self.readers.values())
        assert gone == (not read)

    @rule(lease=st.floats(0.1, 5.0))
    def pin(self, lease: float) -> None:
        pin = self.book.pin(None, lease, self.now)
        self.readers[pin.id] = pin.epoch, self.now + lease

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin = data.draw(st.sampled_from(sorted(self.readers)))
        self.book.unpin(pin)
        del self.readers[pin]

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.book.forget_left(self.now)

    @invariant()
    def what_answers_and_what_is_read_is_there(self) -> None:
        assert self.book.live in self.book.receipts
        for epoch, until in self.readers.values():
            if until > self.now:
                assert epoch in self.book.receipts
        refreshes = [e for e in self.book.unsettled() if self.book.plans[e].own_weights]
        assert len(refreshes) <= 2


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
