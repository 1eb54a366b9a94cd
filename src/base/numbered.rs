//! Enums whose numbers others know: each variant is written down once, with number and name.

/// Declares an enum with `ALL` of its variants in order, the variant of a number (`from_wire`) and
/// a variant's `name`, for the specification, logs and metrics. As separate tables the four would
/// have to be kept in step by hand; nothing but a test would notice when they are not.
macro_rules! numbered {
    (
        $(#[$meta:meta])*
        $visibility:vis enum $Enum:ident: $Number:ident {
            $( $(#[$variant_meta:meta])* $Variant:ident = $number:literal => $name:literal, )+
        }
    ) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        $(#[$meta])*
        #[repr($Number)]
        $visibility enum $Enum {
            $( $(#[$variant_meta])* $Variant = $number, )+
        }

        impl $Enum {
            /// All there are, by number.
            $visibility const ALL: [$Enum; [$($number),+].len()] = [$($Enum::$Variant),+];

            /// The one with this number.
            $visibility const fn from_wire(number: $Number) -> Option<$Enum> {
                match number {
                    $( $number => Some($Enum::$Variant), )+
                    _ => None,
                }
            }

            /// Its name: in the specification, in configuration, metrics and logs.
            $visibility const fn name(self) -> &'static str {
                match self {
                    $( $Enum::$Variant => $name, )+
                }
            }
        }
    };
}

pub(crate) use numbered;

#[cfg(test)]
mod tests {
    numbered! {
        /// Numbers need not be without gaps.
        enum Fruit: u16 {
            /// Green.
            Pear = 2 => "pear",
            /// Blue.
            Plum = 700 => "plum",
        }
    }

    #[test]
    fn numbers_variants_and_names_map_one_to_one() {
        assert_eq!(Fruit::ALL, [Fruit::Pear, Fruit::Plum]);
        assert_eq!(Fruit::ALL.map(|fruit| Fruit::from_wire(fruit as u16)), Fruit::ALL.map(Some));
        assert_eq!((0..=u16::MAX).filter_map(Fruit::from_wire).count(), 2);
        assert_eq!(Fruit::ALL.map(Fruit::name), ["pear", "plum"]);
    }
}
