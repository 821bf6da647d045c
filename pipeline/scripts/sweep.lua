#!lua flags=no-writes
-- sweep: which of these jobs have ended?
-- ARGV: job ids
-- Returns: per id its completion, or 'alive', or 'gone' (neither completion nor live record).
local answer = {}
for i, id in ipairs(ARGV) do
  answer[i] = call('GET', KEY.completion .. id) or (call('EXISTS', KEY.live .. id) == 1 and 'alive' or 'gone')
end
return answer
