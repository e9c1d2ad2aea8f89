# Another language: German, with its capitals, umlauts and ß, in 20 minutes of a CPU. The text, 11
# million characters, is Debian's translated manual pages and handbooks (Debian 12; others differ):
#
#   apt-get download manpages-de manpages-de-dev debian-reference-de debian-faq-de \
#       maint-guide-de installation-guide-amd64
#   for d in *.deb; do dpkg-deb -x $d german/deb; done
#   mkdir -p german/text
#   for f in $(find german/deb -path '*/man/de/*.gz' -type f -o -name '*.de.txt.gz'); do
#     zcat $f | sed -E "/^[.']\\\\\"/d; s/^\\.([BI]|[BIR]{2}|SH|SS) //; /^[.']/d; \
#       s/\\\\f[A-Z]//g; s/\\\\(-)/\\1/g; s/\\\\[&,/|^]//g" > german/text/$(basename $f .gz).txt
#   done
exec(open("config/cpu.py").read())
out_dir = "out/german"

dataset = "german"
sources = ["german/text"]
txt_document = "file"
max_chars = 0
val_rows = 512

lowercase = False
strip_accents = False
ascii_only = False

budget_hours = 1 / 3
