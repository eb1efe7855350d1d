"""The pictures that the scenes are made of, and how they are read from a colour bitmap font."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_STRIKE = 109
"""The size in points at which Noto Color Emoji holds its bitmaps (136 x 128 pixels)."""

_KINDS: dict[str, str] = {
    "fruit": "🍎 red apple,🍏 green apple,🍌 banana,🍊 orange,🍋 lemon,🍇 grapes,🍉 watermelon,"
    "🍓 strawberry,🍒 cherries,🍍 pineapple,🍐 pear",
    "vegetables": "🍅 tomato,🍆 eggplant,🥕 carrot,🌽 corn,🥦 broccoli,🥑 avocado,🍄 mushroom",
    "food": "🍔 hamburger,🍕 pizza,🍟 fries,🍦 ice cream,🍩 doughnut,"
    "🍪 cookie,🍳 fried egg,🧀 cheese",
    "animals": "🐱 cat,🐶 dog,🐭 mouse,🐰 rabbit,🦊 fox,🐼 panda,🐨 koala,🐯 tiger,🦁 lion,🐷 pig,"
    "🐸 frog,🐵 monkey,🐔 chicken,🐧 penguin,🦉 owl,🐠 fish,🐳 whale,🐙 octopus,🦀 crab,"
    "🐢 turtle,🦋 butterfly,🐝 bee,🐞 ladybug,🐘 elephant",
    "vehicles": "🚗 car,🚕 taxi,🚌 bus,🚜 tractor,🚲 bicycle,🚂 train,🚀 rocket,⛵ sailboat",
    "weather": "🌞 sun,🌙 moon,⭐ star,🌈 rainbow,⛄ snowman,⚡ lightning,🔥 fire,💧 drop",
    "faces": "😀 smiling face,😭 crying face,😡 angry face,😎 sunglasses face,👻 ghost,👽 alien,"
    "🤖 robot,💀 skull",
    "plants": "🌵 cactus,🌳 tree,🌻 sunflower,🌹 rose,🍀 clover,🍁 maple leaf,🎃 pumpkin",
    "objects": "💙 blue heart,🎈 balloon,🎁 gift,🎄 christmas tree,⚽ football,🏀 basketball,"
    "🔑 key,🔔 bell,📕 book,💡 light bulb,⏰ clock,📷 camera,🎸 guitar,👑 crown,🏠 house,🎩 hat,"
    "🏆 trophy,🧸 teddy bear",
}

EMOJI: dict[str, str] = {
    entry.split(" ", 1)[1]: entry.split(" ", 1)[0]
    for kind in _KINDS.values()
    for entry in kind.split(",")
}
"""Name in captions -> character. The names are Unicode's, shortened."""


_FIRST = (
    "red apple,banana,orange,grapes,watermelon,strawberry,cherries,pineapple,carrot,broccoli,"
    "mushroom,hamburger,pizza,ice cream,doughnut,cat,fox,panda,pig,frog,penguin,owl,fish,whale,"
    "crab,turtle,butterfly,ladybug,elephant,car,bus,tractor,rocket,sailboat,moon,star,rainbow,"
    "snowman,fire,smiling face,robot,skull,cactus,tree,sunflower,rose,blue heart,balloon,gift,"
    "football,guitar,crown,house"
)
FIRST: tuple[str, ...] = tuple(_FIRST.split(","))
"""Pictures that differ most: training begins with them, and widens once they are crisp."""


def squared(picture: Image.Image) -> Image.Image:
    """Crop an RGBA picture to what is visible and centre that on a transparent square."""
    picture = picture.convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def pictures_of_font(font: Path | str, emoji: Mapping[str, str] = EMOJI) -> dict[str, Image.Image]:
    """Read the pictures of `emoji` from a colour bitmap font (`NotoColorEmoji.ttf`).

    Raises `OSError` where Pillow cannot read the font.
    """
    face = ImageFont.truetype(str(font), _STRIKE)
    pictures = {}
    for name, character in emoji.items():
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((4, 4), character, font=face, embedded_color=True)
        pictures[name] = squared(canvas)
    return pictures


def pictures_of_folder(folder: Path | str) -> dict[str, Image.Image]:
    """Read `NAME.png` files (RGBA); underscores in the file's name become blanks."""
    paths = sorted(Path(folder).glob("*.png"))
    return {path.stem.replace("_", " "): squared(Image.open(path)) for path in paths}


def load_pictures(source: Path | str) -> dict[str, Image.Image]:
    """Pictures by name: `source` is a font file or a folder of PNG files."""
    path = Path(source)
    return pictures_of_folder(path) if path.is_dir() else pictures_of_font(path)


def words_of(names: Iterable[str]) -> list[str]:
    """The words that the names consist of, each once, in order."""
    return list(dict.fromkeys(word for name in names for word in name.split()))
