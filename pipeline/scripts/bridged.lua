#!lua flags=allow-oom
-- bridged: acknowledge responses that a bridge has passed on, or that are none of its business.
-- ARGV[1] group  then per response: entry, its request where it was passed on ('' else)
-- Returns: entries acknowledged (others: another bridge was quicker).
-- Invariant: where a response is wanted is known until it was passed on; whoever is given it before passes it on, too.
local acknowledged = 0
for i = 2, #ARGV, 2 do
  acknowledged = acknowledged + call('XACK', KEY.report_responses, ARGV[1], ARGV[i])
  if ARGV[i + 1] ~= '' then call('DEL', KEY.report_reply .. ARGV[i + 1]) end
end
return acknowledged
