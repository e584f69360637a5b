"""Small tasks that a few demonstrations define: words and what belongs to them, written for this project."""

from __future__ import annotations

import random

from ....interventions import ReattendError

Pair = tuple[str, str]

CAPITALS = (
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin Austria:Vienna Greece:Athens Portugal:Lisbon Ireland:Dublin Norway:Oslo "
    "Sweden:Stockholm Denmark:Copenhagen Finland:Helsinki Poland:Warsaw Hungary:Budapest Romania:Bucharest Bulgaria:Sofia "
    "Russia:Moscow Ukraine:Kyiv Turkey:Ankara Egypt:Cairo Kenya:Nairobi Ghana:Accra Ethiopia:Addis_Ababa Morocco:Rabat Japan:Tokyo "
    "China:Beijing Thailand:Bangkok Vietnam:Hanoi Indonesia:Jakarta Nepal:Kathmandu Iran:Tehran Iraq:Baghdad Cuba:Havana Peru:Lima "
    "Chile:Santiago Argentina:Buenos_Aires Colombia:Bogota Venezuela:Caracas Canada:Ottawa Australia:Canberra"
)
OPPOSITES = (
    "hot:cold big:small tall:short fast:slow old:young rich:poor strong:weak heavy:light early:late open:closed full:empty "
    "wet:dry hard:soft high:low wide:narrow deep:shallow near:far clean:dirty loud:quiet happy:sad brave:cowardly cheap:expensive "
    "sweet:bitter sharp:blunt thick:thin smooth:rough true:false alive:dead first:last buy:sell give:take push:pull begin:end "
    "win:lose remember:forget arrive:leave above:below inside:outside friend:enemy"
)
MORE_CAPITALS = (
    "Belgium:Brussels Netherlands:Amsterdam Switzerland:Bern Serbia:Belgrade Croatia:Zagreb Iceland:Reykjavik Latvia:Riga "
    "Estonia:Tallinn Malta:Valletta Syria:Damascus Lebanon:Beirut Jordan:Amman Qatar:Doha Afghanistan:Kabul Philippines:Manila "
    "Mongolia:Ulaanbaatar Uganda:Kampala Senegal:Dakar Somalia:Mogadishu Libya:Tripoli Tunisia:Tunis Angola:Luanda Ecuador:Quito "
    "Uruguay:Montevideo Jamaica:Kingston Bahamas:Nassau Georgia:Tbilisi Armenia:Yerevan Pakistan:Islamabad Bangladesh:Dhaka"
)
MORE_OPPOSITES = (
    "up:down left:right day:night good:bad black:white love:hate war:peace hello:goodbye always:never more:less before:after "
    "in:out on:off yes:no north:south east:west summer:winter morning:evening male:female king:queen question:answer "
    "success:failure truth:lie rise:fall float:sink laugh:cry light:dark straight:crooked simple:complex public:private "
    "ancient:modern guilty:innocent polite:rude visible:invisible possible:impossible"
)
PAST = (
    "go:went see:saw take:took come:came give:gave find:found think:thought tell:told become:became leave:left feel:felt "
    "bring:brought begin:began keep:kept hold:held write:wrote stand:stood hear:heard run:ran pay:paid meet:met lose:lost "
    "speak:spoke lead:led grow:grew fall:fell send:sent build:built understand:understood draw:drew break:broke spend:spent "
    "rise:rose drive:drove buy:bought wear:wore choose:chose eat:ate drink:drank sing:sang swim:swam fly:flew catch:caught "
    "teach:taught sell:sold win:won forget:forgot sleep:slept throw:threw steal:stole"
)
PLURALS = (
    "man:men woman:women child:children foot:feet tooth:teeth goose:geese mouse:mice leaf:leaves knife:knives wife:wives life:lives "
    "wolf:wolves half:halves city:cities baby:babies story:stories lady:ladies country:countries box:boxes bus:buses class:classes "
    "church:churches dish:dishes watch:watches hero:heroes potato:potatoes tomato:tomatoes cat:cats dog:dogs house:houses tree:trees "
    "book:books chair:chairs bird:birds river:rivers key:keys boy:boys window:windows garden:gardens brother:brothers"
)
# a prompt holds an input and no word about the task, which only pairs can show
TABLES = {
    "opposite": f"{OPPOSITES} {MORE_OPPOSITES}",
    "capital": f"{CAPITALS} {MORE_CAPITALS}",
    "past": PAST,
    "plural": PLURALS,
}


def word_pairs(task: str) -> list[Pair]:
    """(input, output) pairs of a task. Raises ReattendError for one that is not there."""
    if task not in TABLES:
        raise ReattendError(f"task must be one of {', '.join(TABLES)}, or give data of your own; got {task!r}")
    return pairs_in(TABLES[task])


def pairs_in(table: str) -> list[Pair]:
    """The pairs of a table "one:two three:four", in which underscores stand for spaces."""
    return [(x, y) for x, y in (pair.replace("_", " ").split(":") for pair in table.split())]


def parted(task: str, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """(pairs to learn from, pairs to test with), 3 to 2, mixed by the seed."""
    pairs = word_pairs(task)
    random.Random(f"{task} {seed}").shuffle(pairs)
    cut = len(pairs) * 3 // 5
    return pairs[:cut], pairs[cut:]
