"""Plain words that tasks in text are made of."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient bitter bold brave bright brisk broad calm careful clever cold cosy crisp curious deep dusty eager "
    "early faint famous fancy fierce flat fresh gentle giant golden grand green happy heavy hollow honest humble icy "
    "jolly kind late lively lonely loud lucky mellow mighty modest narrow neat noble odd pale patient plain polite "
    "proud quick quiet rapid rare rough round rusty salty shallow sharp shiny silent silver simple sleepy slow small "
    "smooth soft solid steady steep stern sweet swift tall tame tender tidy tiny tough vast warm wide wild wise young"
)
NOUNS = _words(
    "acorn anchor apple arrow badge barn basket beach bell bench berry bird boat bottle bridge brook brush bucket "
    "button candle canyon carpet castle cave chain chair cherry circle clock cloud coast coin copper corner cottage "
    "cradle crane creek crown desert door dragon drum eagle engine falcon feather fence field flute forest fountain "
    "fox garden gate glacier glove hammer harbor hat hill horse house island jacket jar kettle key kite ladder lake "
    "lamp lantern leaf lemon letter lion magnet map market meadow mirror moon mountain needle nest oak ocean orchard "
    "owl paddle paper pebble pencil piano pillow pine planet plum pond prairie river road robin rocket rope sail seed "
    "shell ship shore spoon spring star stone storm stream street table temple thread tiger tower train tunnel valley "
    "violin wagon wall water whale wheel window wolf"
)
FIRST_NAMES = _words(
    "Ada Alan Alice Amir Anna Arthur Astrid Ben Carla Carlos Chen Clara Daniel David Diana Elena Emil Emma Erik Eva "
    "Felix Fiona Frank George Grace Hanna Hector Helen Hugo Ida Igor Ines Ivan Jack James Jane Jonas Julia Karl Kate "
    "Kenji Laura Leo Lina Louis Lucy Luis Maria Mark Martin Maya Mei Nadia Nina Noah Nora Olga Omar Oscar Paul Peter "
    "Petra Rafael Rosa Ruth Sam Sara Simon Sofia Tara Thomas Tina Tom Vera Victor Yusuf Zoe"
)
LAST_NAMES = _words(
    "Adams Allen Bailey Baker Barnes Bell Bennett Brooks Brown Butler Carter Clark Collins Cook Cooper Cox Davis Diaz "
    "Evans Fisher Flores Foster Fox Garcia Gray Green Hall Harris Hayes Henry Hill Howard Hughes Hunt Jackson James "
    "Jenkins Johnson Jones Kelly King Lee Lewis Long Lopez Martin Mason Miller Mills Moore Morgan Morris Murphy Myers "
    "Nelson Ortiz Owens Parker Perez Perry Powell Price Ramos Reed Reyes Rice Rivera Roberts Rogers Ross Russell "
    "Sanders Scott Shaw Silva Simmons Smith Stone Taylor Torres Turner Walker Ward Watson West White Wilson Wood Young"
)
