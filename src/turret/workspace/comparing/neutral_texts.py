"""Neutral paragraphs, written for this package, to measure forgetting.

No task is about them. If the base predicts them worse with an adapter than without it, the adapter made it forget.
"""

PARAGRAPHS = (
    "The harbour wakes before the town does. Fishermen untie their boats in the dark, and the first thing anyone "
    "hears is the slow knock of an engine that has been repaired more often than its owner likes to admit. By the "
    "time the bakery opens, the boats are specks near the horizon, and the gulls have gone with them. Nothing "
    "else happens for an hour, which is what most people who live there say they like about the place.",
    "A good knife needs surprisingly little care. Wash it by hand, dry it at once, and keep it where its edge "
    "touches nothing hard. Most of the damage to kitchen knives is done in drawers and dishwashers rather than on "
    "food. When it no longer slices a ripe tomato under its own weight, draw it a few times along a stone, at the "
    "same angle on both sides, and test it on paper before you go on cooking.",
    "Rivers rarely run straight for long. Where the current is faster, on the outside of a bend, the bank is worn "
    "away; where it is slower, on the inside, sand and gravel settle. So every bend grows, and the river wanders "
    "across its valley over the centuries. Sometimes a loop becomes so narrow that a flood cuts through its neck, "
    "and the old bend is left behind as a still, curved lake.",
    "When my grandmother taught me to play chess, she let me take back as many moves as I wanted, on the "
    "condition that I explained what I had overlooked. The games took whole afternoons. I lost all of them, but I "
    "learned to say what I had been thinking, which turned out to be more useful later than any opening. She kept "
    "the board on top of the piano, and nobody else was allowed to dust it.",
    "Before you paint a wall, wash it. Grease and dust keep the paint from holding, however good it is, and a "
    "single coat on a clean surface lasts longer than three on a dirty one. Fill the holes, let the filler dry "
    "completely, and sand it until you can no longer feel the edge with your fingertips. Then cover the floor, "
    "open a window, and begin at the top.",
    "The library was built with money from a factory that no longer exists. Its reading room has tall windows to "
    "the north, so that the light is even all day, and long oak tables with a brass lamp at each seat. Children "
    "come after school because it is warm; students come before examinations because it is quiet; and a few older "
    "men come every morning for the newspapers, which they read from the last page to the first.",
)
