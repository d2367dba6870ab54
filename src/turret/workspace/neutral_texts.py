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
    "The last bus leaves the square at ten past eleven, and the driver waits a minute longer if he sees "
    "someone running. He has done the route for so many years that he knows which lights will be on in which "
    "houses, and he notices when one of them stays dark.",
    "Bread needs less work than time. Mix flour, water, salt and a little yeast in the evening, cover the "
    "bowl, and leave it on the table. By morning the dough has doubled. Fold it twice, let it rest while the "
    "oven heats, and bake it until the crust sounds hollow when you knock on it.",
    "Swifts spend almost their whole lives in the air. They eat, drink and even sleep on the wing, and they "
    "land only to nest. When a storm comes they fly around it, sometimes for hundreds of kilometres, and "
    "return when the sky has cleared and the insects are up again.",
    "My brother keeps every key he has ever owned in a wooden box under the stairs. Most of them open nothing "
    "any more: bicycles that were stolen, flats that were given up, a cupboard that was burned. He says that "
    "he will throw them away when he moves, and then he moves and takes the box along.",
    "A path through a meadow is made by those who walk it. First the grass is only bent, then it is worn thin, "
    "and after a summer there is bare earth. If nobody comes for a year the clover closes over it, and in two "
    "years you would have to know where it was to find it.",
    "The first telescopes showed their makers more than they had asked for. The moon turned out to have "
    "mountains, the sun had spots, and one of the planets had companions of its own. It took some time until "
    "people agreed that these things had been there all along and were not made by the glass.",
    "On Saturdays the market fills the street from the church to the bridge. The cheese is at the upper end, "
    "where it is cool, and the flowers are by the water. In between you can buy socks, honey, second-hand "
    "books and a soup that is different every week and always called the same.",
    "To fold a map the way it was folded before, look for the creases that bend towards you. Close the long "
    "ones first, as you would close an accordion, and then the short ones. If it resists, you have turned one "
    "of them over; open it again and start from the side with the title.",
    "Snow changes the sound of a town. Steps become soft, cars seem further away, and a voice at the end of "
    "the road is suddenly clear. Children notice it before they look out of the window. By noon the ploughs "
    "have been through, and everything sounds as it did the day before.",
    "The old clockmaker had two rules. He never set a clock by another clock, only by the signal on the radio, "
    "and he never told a customer that a repair was easy. When people asked why, he showed them the drawer "
    "with the screws that somebody else had dropped, and then closed it again.",
    "A compost heap works best if it is fed in layers: something green and wet, then something brown and dry. "
    "Turn it every few weeks so that air gets in. It should be warm in the middle and smell of forest. If it "
    "smells of anything else, add leaves and wait.",
    "The ferry crosses the lake in forty minutes, and there is nothing to do on board but look. The mountains "
    "on the far side grow slowly and never quite arrive. Halfway over, the engine changes its tone, and the "
    "regular passengers put down their newspapers, because the coffee is served then and at no other time.",
    "Languages borrow words as neighbours borrow tools, and not all of them come back. Sailors brought some, "
    "cooks brought many, and a few arrived with a single book that everybody happened to read. After a "
    "generation nobody hears that they were foreign, and somebody writes a letter to complain about the new "
    "ones.",
    "She learned to swim late, in a river, from an aunt who did not believe in pools. The trick, the aunt "
    "said, was to let the water carry you and to be polite to it. Years later she could still feel that river "
    "in every stroke, even in the sea, where the water carries you anyway.",
    "A good chair is harder to make than a good table. The table only has to stand still, but the chair is "
    "pushed, tilted and sat on by people of every shape. The joints must give a little and never come loose, "
    "and the back has to hold you without reminding you that it is there.",
    "Before there were weather reports, people watched what was nearest: the swallows, the smoke, the knees of "
    "the oldest man in the village. Much of it was nonsense, and some of it was not. Low swallows follow low "
    "insects, and insects fly low when the air is damp, so rain is often on its way.",
    "The lighthouse has been empty since the lamp was made to turn on without help. Twice a year two "
    "technicians come by boat, oil a hinge, change a battery and sign the book. In the kitchen there is still "
    "a calendar from the last winter that anyone lived there, open at the month of March.",
    "If you want to draw a hand, do not begin with the fingers. Look at the whole shape, as if it were a "
    "mitten, and draw that first. Then divide it. Most hands that look wrong have fingers that were drawn one "
    "after the other, each of them correct, and together too long for the palm.",
)
