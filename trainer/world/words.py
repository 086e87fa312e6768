"""The words of the synthetic world: a fact reads "mira sold tobar honey".

A fact is four words: who, did what, for whom, and the thing. The first three say which fact it is
and the thing is what is asked for; the verbs take two objects, so that every combination reads as
a sentence.
"""

from itertools import product

_GIVER_STARTS = ("mi", "la", "so", "ne", "ru", "da", "ka", "fi")
_GIVER_ENDS = ("ra", "lin", "mo", "na", "ven")
_RECEIVER_STARTS = ("to", "gre", "bel", "hu", "os", "wen", "yar", "pi")
_RECEIVER_ENDS = ("bar", "dan", "kus", "tin", "mir")

GIVERS = tuple("".join(syllables) for syllables in product(_GIVER_STARTS, _GIVER_ENDS))
RECEIVERS = tuple("".join(syllables) for syllables in product(_RECEIVER_STARTS, _RECEIVER_ENDS))
VERBS = (
    "gave",
    "sold",
    "lent",
    "sent",
    "owes",
    "showed",
    "promised",
    "brought",
    "offered",
    "left",
)
_THINGS = """
amber anchors apples axes barley baskets beads beans bells blankets boats books boots bowls
bread bricks brooms butter buttons candles carpets carrots chairs chalk cheese cherries cider
clocks cloth clover coal coats coffee coins combs copper cotton cups dates doors drums eggs
feathers figs flour flutes furs garlic ginger glass gloves glue gold grapes hammers hats herbs
honey hops horns ink iron ivory jars juice keys kites knives lamps lanterns lemons linen maps
masks melons milk mirrors nails nets nuts oats oil olives onions paint paper pearls pepper
plums pots rice ropes salt seeds silk silver soap spoons tea tiles
"""
THINGS = tuple(_THINGS.split())
