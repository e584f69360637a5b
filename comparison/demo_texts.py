"""The prompts of the demo. The story is written for it, so that no model has seen it."""

from __future__ import annotations

STORY = """\
The ferry to Ostermoor leaves the old harbour twice a day, in the morning at seven and in the afternoon at four. Most of the
passengers are people of the island who have been to the market in town, and a few are visitors who come for the birds. The crossing
takes fifty minutes when the sea is calm, and twice as long when the wind stands against the tide. There is a small room with a stove
below deck, but in summer everybody sits outside on the crates and watches the coast become thin and grey.

On the pier of the island a boy sells apples from a cart. He knows every passenger by name and tells each of them what has happened
since they left: whose boat has been painted, which hen has been lost, who has quarrelled about a fence. Behind the pier the road
divides. The left branch follows the shore to the lighthouse, the right one climbs to the village and goes on to the fields.

{needle}

The village has one shop, one school with nine children, and a bakery that opens only on three days of the week. The baker says that
bread wants to rest as much as people do. Her oven was built by her grandfather from the bricks of a wrecked ship, and the bricks
still smell of salt when it rains. On the days without bread the islanders eat flat cakes of oat and cheese, and nobody complains.

Above the village stands the school. Its teacher came for a single winter and has stayed for eleven years. She keeps a weather book
in which the children write every morning: the wind, the clouds, the height of the water at the third step of the pier. Scientists from
the mainland have asked to copy it, because no other record of that coast reaches back so far without a gap. The children find this
very funny, since the youngest of them has drawn a fish in place of the clouds on every single Tuesday.

In the fields grow barley and beans, and between them lie low walls of stone that keep the wind off the soil. The walls are older than
any family on the island. When one of them falls, everybody comes to build it up again, and afterwards there is soup in the barn and
somebody plays the accordion. In autumn the geese arrive, thousands of them, and for two weeks their noise is so great that people
close the windows to be able to talk.

The lighthouse at the end of the shore road has had no keeper for a long time, but a woman from the village still climbs its stairs
on the first day of each month to wipe the glass. From up there one can see the ferry leave the town, a white dot that hardly seems to
move. She says that this is the best hour of the month, and that she would do it even if the lamp had gone out for ever.
"""

NEEDLE = "The secret code that opens the door of the lighthouse is 7294, and it is written down nowhere else."
QUESTION = "What is the secret code that opens the door of the lighthouse?"
EARLY_QUESTION = "At what times does the ferry to Ostermoor leave the old harbour?"
